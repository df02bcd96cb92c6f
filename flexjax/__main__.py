"""`python -m flexjax` is the command line."""

from flexjax.cli.main import main

if __name__ == '__main__':
  main()
