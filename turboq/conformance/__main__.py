"""python -m turboq.conformance: checks implementations and prints a verdict table.

    python -m turboq.conformance                                    all codecs of turboq
    python -m turboq.conformance --codec=turboquant_mse --dim=64
    python -m turboq.conformance --adapter=my_module:MyAdapter      yours, 2, 3 and 4 bits, D=128

Exit status: 0 all pass, 1 something failed, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from turboq.conformance import adapters, ours, run, verdict


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m turboq.conformance",
        description="Checks quantizers against exact tables, closed forms, hard inputs and bytes.",
    )
    parser.add_argument(
        "--adapter", action="append", metavar="MODULE:CLASS", help="yours; may be repeated"
    )
    parser.add_argument(
        "--codec",
        action="append",
        metavar="NAME",
        help="a codec of turboq, or of your package (my_codecs.sign:3); may be repeated",
    )
    parser.add_argument("--dim", type=int, nargs="+", default=[128], help="head dims (128)")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="for --adapter")
    parser.add_argument("--vectors", type=int, default=run.VECTORS, help="multiple of 512 (4096)")
    parser.add_argument("--quick", action="store_true", help="one setting per codec of turboq")
    parser.add_argument("--explain", action="store_true", help="a line for every check")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        chosen: dict[str, adapters.Adapter] = {}
        for spec in args.adapter or ():
            chosen |= adapters.load(spec, args.dim, args.bits)
        if args.codec or not args.adapter:
            chosen |= ours.adapters(args.dim, args.codec, quick=args.quick)
        results = {name: run.check(a, vectors=args.vectors) for name, a in chosen.items()}
    except ValueError as error:
        print(f"turboq.conformance: error: {error}", file=sys.stderr)
        return 2
    print(verdict.table(results, explain=args.explain))
    failed = sum(any(v.failed for v in verdicts) for verdicts in results.values())
    print(f"\n{len(results)} checked, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
