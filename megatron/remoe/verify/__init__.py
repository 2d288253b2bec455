"""Checks that a user can run: does this machine train the same run under every layout?"""
