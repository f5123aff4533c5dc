"""Help pages of the `turboq` command, from subcommand docstrings and absl flag descriptions."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from types import ModuleType

from absl import flags

WIDTH = 96


def overview(commands: Mapping[str, str]) -> str:
    """The page of `turboq --help`."""
    rows = "\n".join(f"  {name:<11}{line}" for name, line in commands.items())
    return (
        "turboq: learned per-head KV-cache quantization.\n\n"
        "usage: turboq COMMAND [--flag=value ...]\n\n"
        f"commands:\n{rows}\n\n"
        "turboq COMMAND --help     one command's flags\n"
        "turboq --helpfull         every command's flags\n"
        "turboq --version          the version\n"
        "--flagfile=FILE           after any command: read flags from a file, one per line"
    )


def command(name: str, module: ModuleType, values: flags.FlagValues) -> str:
    """The page of `turboq NAME --help`."""
    required = [f"--{flag}=..." for flag in module.REQUIRED]
    usage = " ".join(["turboq", name, getattr(module, "ARGUMENTS", ""), *required, "[flags]"])
    lines = [f"usage: {' '.join(usage.split())}", "", (module.__doc__ or "").strip(), "", "flags:"]
    for flag in values:
        lines.append(_flag(values[flag], required=flag in module.REQUIRED))
    return "\n".join(lines)


def _flag(flag: flags.Flag, *, required: bool) -> str:
    if flag.boolean:
        head = f"  --[no]{flag.name}"
    elif isinstance(flag, flags.EnumFlag):
        head = f"  --{flag.name}={'|'.join(flag.parser.enum_values)}"
    elif isinstance(flag, flags.MultiFlag):
        head = f"  --{flag.name}=...  (may be repeated)"
    else:
        head = f"  --{flag.name}=..."
    note = " (required)" if required else _default(flag)
    # absl adds to the help of some kinds of flags what the head line already says.
    text = re.sub(r"^<[^>]*>: |;\s+repeat this option.*$", "", flag.help or "", flags=re.DOTALL)
    body = textwrap.wrap(" ".join(text.split()) + note, WIDTH - 8)
    return "\n".join([head, *(f"        {line}" for line in body)])


def _default(flag: flags.Flag) -> str:
    if flag.default is None or flag.default == [] or (flag.boolean and not flag.default):
        return ""
    shown = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    return f" [default: {shown}]"
