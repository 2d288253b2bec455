__import__("setuptools").setup()  # for tools that look for this file; pyproject.toml has everything
