"""`remoe verify gpu`: stages that prove the project on one GPU, and their report.

`stages` says what is run, `readings` what is read out of the results, `runner` runs the stages
within a budget of time, and `report` writes what is known after each of them.
"""
