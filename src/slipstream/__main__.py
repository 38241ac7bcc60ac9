"""`python -m slipstream` is the `slipstream` command."""

from slipstream.commands.main import app

if __name__ == "__main__":
    app(prog_name="slipstream")
