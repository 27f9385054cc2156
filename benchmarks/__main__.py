"""`python -m benchmarks [NAME ...]`: without names, all of them."""

from __future__ import annotations

import argparse
from importlib import import_module

NAMES = ("decode", "first_token", "restore", "consolidation", "stability", "store", "memory_layer")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="*", choices=[*NAMES, []], help="what to measure")
    for name in parser.parse_args().name or NAMES:
        import_module(f"benchmarks.{name}").main()


main()
