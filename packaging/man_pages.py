"""Writes the manual: `packaging/man_pages.py DIRECTORY` makes DIRECTORY/man1 and DIRECTORY/man5.

mirrorfs(1) and a page for each command are made of the command line itself, so they say what `--help` says; mirrorfs.toml(5) is
made of docs/CONFIGURATION.md. A page is roff with the macros of man(7), in ASCII, and the same for the same version.
"""

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import typer.main

from mirrorfs.cli import app

_PROJECT: Final = Path(__file__).resolve().parents[1]
_NAME: Final = "mirrorfs"

#: In text a minus is a hyphen and a quote is curled unless they are named.
_SPECIAL: Final = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"}
_STATUSES: Final = (
    ("0", "Done."),
    ("1", "It failed; one line on stderr says why and what to do. What else it means for a command stands in its page."),
    ("2", "The command line or the configuration is wrong, and nothing was done."),
    ("3", "Refused, since it could lose data or is not safe now; `--force` would do it, where the command has that."),
    ("4", "Only a person can know whether it is right, and there was no terminal to ask on: `--yes` says so."),
    ("130", "Interrupted by Ctrl-C."),
)
_VARIABLES: Final = (
    ("MIRRORFS_CONFIG", "The configuration file, if `--config` is not given."),
    ("MIRRORFS_NODE", "The name of this machine's node in it, if `--node` is not given."),
    ("MIRRORFS_SESSION", "`kernel` or `pyfuse3`, in place of the configuration's `session`."),
)
_FILES: Final = (
    ("/etc/mirrorfs/NAME.toml", "The configuration of a volume, see mirrorfs.toml(5)."),
    ("/etc/mirrorfs/keys/", "Who this node is, and whom it trusts."),
    ("/var/lib/mirrorfs/VOLUME/NODE/", "What this node keeps outside the tree: epochs, ids, what the other node may lack."),
    ("/run/mirrorfs/", "The control sockets of the mount and of the controller."),
    ("/usr/share/doc/mirrorfs/", "README.md and all other documentation."),
)


def main() -> None:
    """Write all pages below the directory that is given; ends with exit status 2 if none is."""
    if len(sys.argv) != 2:
        print("usage: man_pages.py DIRECTORY", file=sys.stderr)
        sys.exit(2)
    write(Path(sys.argv[1]))


def write(directory: Path) -> list[Path]:
    """Write all pages into man1 and man5 of the directory, which are made; returns their paths."""
    pages = {f"man1/{name}.1": text for name, text in _of_commands()}
    pages["man5/mirrorfs.toml.5"] = _of_configuration((_PROJECT / "docs" / "CONFIGURATION.md").read_text(encoding="utf-8"))
    written = []
    for place, text in pages.items():
        path = directory / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
        written.append(path)
    return written


# ---- the commands


def _of_commands() -> Iterator[tuple[str, str]]:
    """Names and texts of the pages of section 1."""
    root = typer.main.get_command(app)
    context = typer.Context(root, info_name=_NAME, **root.context_settings)
    yield from _of_command(root, context, ())


def _of_command(command: Any, context: typer.Context, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The page of a command, and those of the commands in it."""
    words = (*above, str(context.info_name))
    name = "-".join(words)
    short, _, more = _sentences(command.help or "")
    children = {key: child for key, child in getattr(command, "commands", {}).items() if not child.hidden}
    lines = [_title(name, 1), ".SH NAME", f"{_escaped(name)} \\- {_escaped(short.rstrip('.'))}"]
    lines += [".SH SYNOPSIS", f"\\fB{_escaped(' '.join(words))}\\fR {_escaped(' '.join(_usage(command, context)))}"]
    lines += [".SH DESCRIPTION", _in_text(f"{short} {more}".strip())]
    if not above:
        lines += [
            ".PP",
            _in_text("The file is described in mirrorfs.toml(5). README.md says what is promised, and what is not."),
        ]
    arguments, options = [], []
    for parameter in command.get_params(context):
        term, text = _parameter(parameter)
        if parameter.param_type_name != "argument":
            options.append((term, text))
        elif text:
            arguments.append((term, text))
    lines += _terms("ARGUMENTS", arguments)
    lines += _terms("COMMANDS", [(f"{'-'.join((*words, key))}(1)", child.help or "") for key, child in children.items()])
    lines += _terms("OPTIONS", options)
    if not above:
        lines += _terms("EXIT STATUS", _STATUSES) + _terms("ENVIRONMENT", _VARIABLES) + _terms("FILES", _FILES)
    others = ["mirrorfs.toml(5)"] if not above else [f"{'-'.join(above)}(1)", "mirrorfs.toml(5)"]
    lines += [".SH SEE ALSO", ", ".join(_reference(other) for other in others)]
    yield name, "\n".join(lines) + "\n"
    for key, child in children.items():
        inside = typer.Context(child, info_name=key, parent=context, **child.context_settings)
        yield from _of_command(child, inside, words)


def _usage(command: Any, context: typer.Context) -> list[str]:
    """What follows the command's name."""
    names = [str(p.metavar or p.name.upper()) for p in command.get_params(context) if p.param_type_name == "argument"]
    return ["[OPTIONS]", *names, *(["COMMAND ..."] if hasattr(command, "commands") else [])]


def _parameter(parameter: Any) -> tuple[str, str]:
    """How an option or an argument is written, and what it means."""
    text = str(parameter.help or "")
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper()), text
    term = ", ".join(sorted(parameter.opts, key=len))
    if parameter.is_flag or parameter.name == "help":
        return term, text
    if parameter.metavar:
        value = str(parameter.metavar)
    else:
        value = "N" if isinstance(parameter.default, int | float) else parameter.name.upper()
    if isinstance(parameter.default, int | float) and "efault" not in text:
        text = f"{text} Default: {parameter.default:g}."
    return f"{term} {value}", text


# ---- the configuration


def _of_configuration(markdown: str) -> str:
    """mirrorfs.toml(5) of the page of the documentation: its headings, paragraphs, lists and tables."""
    lines = [_title("mirrorfs.toml", 5), ".SH NAME", r"mirrorfs.toml \- the configuration of a mirrored volume"]
    lines += [".SH SYNOPSIS", r"\fI/etc/mirrorfs/NAME.toml\fR", ".SH DESCRIPTION"]
    for kind, block in groupby(markdown.splitlines(), key=_kind):
        texts = list(block)
        match kind:
            case "heading":
                lines += [f".SH {_escaped(text.lstrip('# ').upper())}" for text in texts if text.startswith("##")]
            case "table":
                lines += _table(texts)
            case "text":
                lines += [".PP", _in_text(" ".join(texts))]
            case _:
                pass
    lines += [".SH SEE ALSO", _reference("mirrorfs(1)")]
    # .PP directly after a heading is one too many.
    page = "\n".join(lines) + "\n"
    return re.sub(r"^(\.SH .*)\n\.PP$", r"\1", page, flags=re.MULTILINE)


def _kind(line: str) -> str:
    if line.startswith("#"):
        return "heading"
    if line.startswith("|"):
        return "table"
    return "text" if line.strip() else "nothing"


def _table(lines: list[str]) -> list[str]:
    """A term of each row: the first column, and under it the others; a default says that it is one."""
    # The heads of the columns, then a line that says how they are aligned.
    head, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]
    made = []
    for term, *cells in rows:
        named = [_with_head(name, cell) for name, cell in zip(head[1:], cells, strict=False)]
        made += [".TP", f"\\fB{_escaped(_plain(term))}\\fR", "; ".join(_in_text(cell) for cell in named if cell)]
    return made


def _with_head(head: str, cell: str) -> str:
    """A cell that means nothing without the head of its column has it before it."""
    says_more = not cell or re.search("required|at least|with etcd|in the order", cell)
    return cell if head != "default" or says_more else f"default: {cell}"


# ---- roff


def _title(name: str, section: int) -> str:
    return (
        f'.TH "{_escaped(name.upper() if section == 1 else name)}" "{section}" "" "{_NAME} {metadata.version(_NAME)}" "{_NAME}"'
    )


def _terms(heading: str, terms: Any) -> list[str]:
    """A section of terms, each with its text below it; nothing if there are none."""
    lines = [f".SH {heading}"] if terms else []
    for term, text in terms:
        lines += [".TP", _reference(term) if term.endswith(")") else f"\\fB{_escaped(term)}\\fR", _in_text(text)]
    return lines


def _reference(page: str) -> str:
    name, _, section = page.partition("(")
    return f"\\fB{_escaped(name)}\\fR({section}"


def _sentences(text: str) -> tuple[str, str, str]:
    """The first sentence, and what follows it."""
    text = " ".join(text.split())
    first, separator, more = text.partition(". ")
    return (first + "." if separator else text), separator, more


def _plain(markdown: str) -> str:
    """Without the marks of code and emphasis, and without the targets of links."""
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "").replace("**", "")


def _in_text(markdown: str) -> str:
    """A line of text: what stands between backticks is bold, and so is what it says is a page of the manual."""
    markdown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown).replace("**", "")
    made = ""
    for number, part in enumerate(markdown.split("`")):
        made += f"\\fB{_escaped(part)}\\fR" if number % 2 else re.sub(r"([\w.]+)\((\d)\)", r"\\fB\1\\fR(\2)", _escaped(part))
    return f"\\&{made}" if made.startswith((".", "'")) else made


def _escaped(text: str) -> str:
    """Text as it is to be read: nothing in it is a request, an escape or another character than it looks."""
    made = "".join(_SPECIAL.get(letter) or (letter if letter.isascii() else f"\\[u{ord(letter):04X}]") for letter in text)
    return f"\\&{made}" if made.startswith(".") else made


if __name__ == "__main__":
    main()
