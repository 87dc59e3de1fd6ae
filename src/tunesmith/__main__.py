"""`python -m tunesmith`, and what torchrun starts."""

from tunesmith.cli.main import run

if __name__ == "__main__":
    run()
