"""Manual page source (roff, man macros) -> readable text, without groff, which a small machine lacks.

Not a formatter: fonts, indents and tables go; headings, paragraphs, tags and example blocks stay.
"""

import re

_GLYPHS = {
    "aq": "'", "dq": '"', "cq": "'", "oq": "'", "lq": '"', "rq": '"', "bu": "*", "em": "--", "en": "-", "hy": "-",
    "ti": "~", "ha": "^", "rs": "\\", "co": "(c)", "rg": "(R)", "tm": "(TM)", "bv": "|", "ga": "`", "aa": "'",
    "->": "->", "<-": "<-", "la": "<", "ra": ">", "mu": "x", "pl": "+", "mi": "-", "eq": "=", "sl": "/", "at": "@",
    "sh": "#", "Do": "$", "Cs": "", "lB": "[", "rB": "]", "lC": "{", "rC": "}", ">=": ">=", "<=": "<=", "!=": "!=",
}  # fmt: skip
# \*(Aq and the like: strings that man pages define; the common ones by name.
_STRINGS = {
    "Aq": "'",
    "lq": '"',
    "rq": '"',
    'L"': '"',
    'R"': '"',
    "C`": "",
    "C'": "",
    "R": "(R)",
    "Tm": "(TM)",
    "--": "--",
}
_ESCAPE = re.compile(
    r"\\(?:"
    r"f(?:\(..|\[[^\]]*\]|.)"  # font
    r"|s[-+]?(?:\(..|\[[^\]]*\]|'[^']*'|\d\d?)"  # size
    r"|[mMF]\[[^\]]*\]"  # colour, family
    r"|[hvwxblLo]'[^']*'"  # motions and drawings
    r"|\*(?:\((?P<string2>..)|\[(?P<string>[^\]]*)\]|(?P<string1>.))"
    r"|\((?P<glyph2>..)|\[(?P<glyph>[^\]]*)\]"
    r"|n(?:\(..|\[[^\]]*\]|.)"  # number register
    r"|(?P<plain>.)|$)"
)
_PLAIN = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "t": "\t", "'": "'", "`": "`", ".": "."}
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)')
_JOINED = {"BR", "RB", "BI", "IB", "IR", "RI"}
_BREAKS = {"PP", "P", "LP", "sp", "br", "HP", "RS", "RE", "TP", "TQ"}
_SHOWN = {"B", "I", "SM", "SB", "R", "CW"}
_COMMENT = re.compile(r'(?<!\\)\\["#].*')


def roff_to_text(source: str) -> str:
    """The page as paragraphs of one line each; empty for a redirection (.so) or a page in the mdoc language."""
    start = re.search(r"^\.\s*TH\b.*\n?", source, re.MULTILINE)
    # Before .TH stand the generator's own macro definitions.
    return _Page().read(source[start.end() :].splitlines()) if start else ""


class _Page:
    """One reading of a page: paragraphs so far and the one being filled."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.words: list[str] = []
        self.verbatim = False

    def read(self, lines: list[str]) -> str:
        skip_until: str | None = None
        for line in lines:
            if skip_until is not None:
                skip_until = None if re.match(skip_until, line) else skip_until
                continue
            line = _COMMENT.sub("", line)
            if re.match(r"[.']\s*(?:[A-Za-z]|$|\\)", line):
                skip_until = self._macro(line)
            elif self.verbatim:
                self.words.append(_plain(line).rstrip())
            elif line.strip():
                self.words.append(_plain(line).strip())
            else:
                self._flush()
        self._flush()
        return "\n\n".join(self.blocks).strip() + "\n"

    def _macro(self, line: str) -> str | None:
        """Handles one request line; returns the pattern of the line that ends what it opens and we skip."""
        name, _, rest = line[1:].strip().partition(" ")
        arguments = [_plain(quoted.replace('""', '"') or word) for quoted, word in _ARGUMENT.findall(rest)]
        if name in ("de", "ig", "am"):
            return r"\.\.|'\.\."
        if name in ("TS", "EQ", "PS"):
            return rf"\.{name[0]}E"
        if name in ("if", "ie", "el") and line.rstrip().endswith(r"\{\\"[:-1]) and "t" in rest.split()[:1]:
            return r".*\\\}"
        if name in ("SH", "SS"):
            self._flush()
            self.blocks.append(" ".join(arguments))
        elif name in ("nf", "EX", "Vb"):
            self._flush()
            self.verbatim = True
        elif name in ("fi", "EE", "Ve"):
            self._flush()
            self.verbatim = False
        elif name in _BREAKS:
            self._flush()
        elif name == "IP":
            self._flush()
            self.words += arguments[:1]
        elif name in _JOINED:
            self.words.append("".join(arguments))
        elif name in _SHOWN:
            self.words.append(" ".join(arguments))
        return None

    def _flush(self) -> None:
        block = "\n".join(self.words).strip("\n") if self.verbatim else " ".join(filter(None, self.words))
        if block.strip():
            self.blocks.append(block)
        self.words = []


def _plain(text: str) -> str:
    return _ESCAPE.sub(_meaning, text) if "\\" in text else text


def _meaning(escape: re.Match[str]) -> str:
    string = escape["string2"] or escape["string"] or escape["string1"]
    if string is not None:
        return _STRINGS.get(string, "")
    glyph = escape["glyph2"] or escape["glyph"]
    if glyph is not None:
        number = re.fullmatch(r"u([0-9A-F]{4,5})", glyph)
        return chr(int(number[1], 16)) if number else _GLYPHS.get(glyph, "")
    return _PLAIN.get(escape["plain"] or "", "")
