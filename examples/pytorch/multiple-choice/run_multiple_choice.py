"""run_swag.py under its old name."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("run_swag.py")), run_name="__main__")
