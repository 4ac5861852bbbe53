r"""What GitHub makes of a Markdown file, as far as formulas and links go.

GitHub processes Markdown first and looks for `$…$` and `$$…$$` in what is left. By then `\,` has lost its backslash,
two underscores can have become emphasis, `<b>` a tag, and a bar in a table ends the cell. Only $`…`$ and ```math blocks
reach the mathematics as they were written.
"""

import re
import string
import unicodedata
from dataclasses import dataclass

FENCE = re.compile(r"^[ >]*(?:(?:[-+*]|\d+[.)])[ ]+)?(`{3,}|~{3,})[ ]*([^`]*)$")
DELIMITER_ROW = re.compile(r"^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")
NEW_BLOCK = re.compile(r"^ {0,3}(#{1,6}( |$)|>|[-+*] |\d{1,9}[.)] |(\*\s*){3,}$|(-\s*){3,}$|(_\s*){3,}$|=+\s*$)")
TAG = re.compile(r"<(/?[A-Za-z][^<>]*>|!--|!|\?|[A-Za-z/])")
ENTITY = re.compile(r"&(#\d+|#[xX][0-9a-fA-F]+|[A-Za-z]\w*);")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^\s()<>]*)>?[^()]*\)")


@dataclass
class Block:
    """Lines that are processed together: a paragraph, an item, a heading, one row of a table, or a fence's inside."""

    line: int
    text: str
    kind: str  # "text", "row" or "math"


def blocks(text):
    """(the blocks of a document in which formulas can stand, the faults of its fences)"""
    found, faults, paragraph, lines = [], [], [], text.split("\n")
    in_list = table = comment = False
    fence, after_blank, code = None, True, False

    def end():
        if paragraph:
            found.append(Block(paragraph[0][0], "\n".join(line for _, line in paragraph), "text"))
            paragraph.clear()

    for n, line in enumerate(lines, 1):
        if fence:
            mark, start, info, inside = fence
            if re.match(rf"^[ >]*{re.escape(mark[0])}{{{len(mark)},}}\s*$", line):
                if info == "math":
                    found.append(Block(start + 1, "\n".join(inside), "math"))
                fence = None
            else:
                inside.append(line)
            continue
        if comment or line.lstrip().startswith("<!--"):
            end()
            comment = "-->" not in line
            continue
        opening = FENCE.match(line)
        if opening:
            end()
            fence, table, code = (opening[1], n, opening[2].strip(), []), False, False
            continue
        if not line.strip():
            end()
            after_blank, table = True, False
            continue
        indented = line.startswith(("    ", "\t"))
        if indented and not in_list and (code or (after_blank and not paragraph)):
            code, after_blank = True, False
            continue
        code = False
        if after_blank and not line.startswith(" ") and not NEW_BLOCK.match(line):
            in_list = False
        if re.match(r"^\s*([-+*]|\d{1,9}[.)]) ", line):
            in_list = True
        following = lines[n] if n < len(lines) else ""
        begins = "|" in line and "|" in following and DELIMITER_ROW.match(following)
        if table or (begins and not DELIMITER_ROW.match(line)):
            end()
            table = True
            if not DELIMITER_ROW.match(line):
                found.append(Block(n, line, "row"))
        else:
            if NEW_BLOCK.match(line.lstrip() if in_list else line):
                end()
            paragraph.append((n, line))
            if re.match(r"^ {0,3}#{1,6} ", line):
                end()
        after_blank = False
    end()
    if fence:
        faults.append(f"line {fence[1]}: a fence that is not closed")
    return found, faults


def formula_faults(text):
    """What is wrong with the formulas of a document, one line each."""
    found, faults = blocks(text)
    for block in found:
        if block.kind == "math":
            faults += [f"line {block.line}: {fault}" for fault in tex_faults(block.text)]
            continue
        for at, fault in faults_of_text(block.text, row=block.kind == "row"):
            faults.append(f"line {block.line + block.text.count(chr(10), 0, at)}: {fault}")
    return faults


def tex_faults(formula):
    """Braces, \\left … \\right and \\begin … \\end that do not match, and what GitHub's renderer refuses."""
    bare = re.sub(r"\\[\\{}]", "", formula)
    depth = 0
    for c in bare:
        depth += (c == "{") - (c == "}")
        if depth < 0:
            break
    pairs = ((r"\\left(?![a-z])", r"\\right(?![a-z])"), (r"\\begin\b", r"\\end\b"))
    if depth:
        yield f"braces that do not match: {formula.strip()}"
    for left, right in pairs:
        if len(re.findall(left, formula)) != len(re.findall(right, formula)):
            yield f"{left} without {right}: {formula.strip()}"
    if not formula.strip():
        yield "an empty formula"
    if re.search(r"\\(newcommand|def|operatorname|require|href)\b", formula):
        yield f"a macro that GitHub refuses: {formula.strip()}"


def scanned(text):
    """The pieces of inline text that have a meaning of their own, (kind, start, end), in their order.

    kind: "escape"; "code"; "quoted" for $`…`$; "tag"; "link" for the target of one; "$" and "$$"
    """
    i, n = 0, len(text)
    while i < n:
        c, size, kind = text[i], 1, None
        if c == "\\" and i + 1 < n and text[i + 1] in string.punctuation + "\n":  # a line's end: a hard break
            kind, size = "escape", 2
        elif text.startswith("$`", i) and (close := text.find("`$", i + 2)) > 0 and "`" not in text[i + 2 : close]:
            kind, size = "quoted", close + 2 - i
        elif c == "`":
            size = len(re.match("`+", text[i:])[0])
            close = re.search(rf"(?<!`)`{{{size}}}(?!`)", text[i + size :])
            if close:
                kind, size = "code", size + close.end()
        elif c == "<" and (tag := TAG.match(text, i)):
            kind, size = "tag", tag.end() - i
        elif c == "]" and (link := re.match(r"\]\([^()\s]*\)", text[i:])):
            kind, size = "link", link.end()
        elif c == "$":
            kind = "$$" if text.startswith("$$", i) else "$"
            size = len(kind)
        if kind:
            yield kind, i, i + size
        i += size


def faults_of_text(text, row=False):
    """(place, fault) for every formula that would not arrive as it is written."""
    pieces = list(scanned(text))
    dollars = [piece for piece in pieces if piece[0] in ("$", "$$")]
    spans, faults, k = [], [], 0
    while k < len(dollars):
        kind, start, inside = dollars[k]
        closing = next((d for d in dollars[k + 1 :] if d[0] == kind), None)
        if closing is None:
            faults.append((start, f"a dollar without another one: {text[start : start + 30]!r}"))
            break
        spans.append((kind, start, inside, closing[1], closing[2]))
        k = dollars.index(closing) + 1

    for kind, start, end in pieces:
        formula = text[start:end]
        if kind == "quoted":
            before, after = text[start - 1 : start], text[end : end + 1]
            if before.isalnum() or after.isalnum():
                faults.append((start, f"a formula that touches a letter or a digit: {before}{formula}{after}"))
            if row and "|" in formula:
                faults.append((start, f"a bar in a row of a table: {formula}"))
            faults += [(start, fault) for fault in tex_faults(text[start + 2 : end - 2])]

    emphasised = list(emphasis(text, pieces))
    for kind, start, inside, close, end in spans:
        formula, content = text[start:end], text[inside:close]
        wrong = []
        add = wrong.append
        within = [p for p in pieces if inside <= p[1] < close]
        for piece, at, to in within:
            if piece == "escape":
                add(f"Markdown takes the backslash of {text[at:to]!r}")
            elif piece == "$$":
                add("two dollars inside of one")
            elif piece == "tag":
                add(f"{text[at:to]} begins a tag")
            elif piece in ("code", "quoted"):
                add("a backtick inside of dollars")
            elif piece == "link":
                add("brackets that make a link")
        for a, b in emphasised:
            if inside <= a < close or inside <= b < close:
                add(f"{text[a]} makes emphasis")
                break
        if ENTITY.search(content):
            add("an entity")
        if row and "|" in content:
            add("a bar in a row of a table")
        if kind == "$":
            before, after = text[start - 1 : start], text[end : end + 1]
            if before and not before.isspace() and before not in "([{|*_>—–":
                add(f"GitHub opens no formula after {before!r}")
            if after.isalnum() or after == "_":
                add(f"GitHub closes no formula before {after!r}")
            if content[:1].isspace() or content[-1:].isspace():
                add("a space inside a dollar")
        faults += [(start, f"{what}: {formula}") for what in wrong]
        faults += [(start, fault) for fault in tex_faults(content)]
    return sorted(faults)


def emphasis(text, pieces):
    """The places of the delimiters, (opening, closing), that CommonMark makes emphasis (or, of tildes, deletion) of."""
    opaque = {i for kind, a, b in pieces if kind not in ("$", "$$") for i in range(a, b)}
    symbol = lambda c: unicodedata.category(c)[0] in "PS"
    runs = []  # [character, start, count that is left, can open, can close, length]
    for found in re.finditer(r"\*+|_+|~+", text):
        if found.start() in opaque:
            continue
        c, length = found[0][0], len(found[0])
        before = text[found.start() - 1 : found.start()] or " "
        after = text[found.end() : found.end() + 1] or " "
        left = not after.isspace() and (not symbol(after) or before.isspace() or symbol(before))
        right = not before.isspace() and (not symbol(before) or after.isspace() or symbol(after))
        if c == "_":
            opens, closes = left and (not right or symbol(before)), right and (not left or symbol(after))
        elif c == "~":
            opens, closes = left and length <= 2, right and length <= 2
        else:
            opens, closes = left, right
        runs.append([c, found.start(), length, opens, closes, length])
    for k, closer in enumerate(runs):
        while closer[4] and closer[2]:
            for opener in reversed(runs[:k]):
                c, start, count, opens, both, length = opener
                if c != closer[0] or not opens or not count:
                    continue
                odd = (both or closer[3]) and (length + closer[5]) % 3 == 0 and (length % 3 or closer[5] % 3)
                if c == "~":
                    odd = length != closer[5]
                if not odd:
                    break
            else:
                break
            used = closer[2] if c == "~" else 2 if min(count, closer[2]) > 1 else 1
            yield start + count - 1, closer[1] + closer[5] - closer[2]
            opener[2] -= used
            closer[2] -= used
            for between in runs[runs.index(opener) + 1 : k]:
                between[2] = 0  # what stands between them cannot match across


# ---- links


def slug(heading):
    """GitHub's anchor of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(text):
    """The anchors of a document; of equal headings the later ones are numbered."""
    found, seen = set(), {}
    for heading in re.findall(r"^#{1,6} (.*)$", without_code(text), re.MULTILINE):
        name = slug(heading)
        found.add(name if name not in seen else f"{name}-{seen[name]}")
        seen[name] = seen.get(name, 0) + 1
    return found


def without_code(text):
    """The document without its fences."""
    return re.sub(r"^([ ]*)(`{3,}|~{3,}).*?^[ ]*\2[`~]*[ ]*$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text):
    """The targets of links and pictures, outside of code and formulas."""
    found, _ = blocks(text)
    for block in found:
        if block.kind != "math":
            hidden = [(a, b) for kind, a, b in scanned(block.text) if kind in ("code", "quoted")]
            for link in LINK.finditer(block.text):
                if not any(a <= link.start() < b for a, b in hidden):
                    yield link[1]
