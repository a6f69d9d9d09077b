"""The command line, a file for each noun. Nothing heavy is imported before a command runs."""
