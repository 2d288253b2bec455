"""Read the command that a launch script would run, without running the script.

A launch script in bash sets variables and arrays, chooses between some with `if`, and runs one
program. This module follows exactly that. What it cannot follow it refuses with the line, and a
value that only the machine knows, as `$(date)`, is refused where it is needed.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_EXPANSION = re.compile(
    r"(?P<name>\w+)(?P<index>\[[^\]]*\])?(?:(?P<op>:?[-=+?])(?P<word>.*))?", re.DOTALL
)
_REDIRECTION = re.compile(r"\d*(?:&>>|&>|>>|>&|<&|>\||>|<(?!<))")
_OPERATORS = ("<<<", "<<", "&&", "||", ";;", "|&", "|", "&", ";", "(", ")", "\n")
_DECLARE = ("export", "declare", "local", "readonly", "typeset")
# Words that start what cannot be followed, and commands that change variables in other ways.
_REFUSED = {"for", "while", "until", "case", "select", "function", "{", "shift", "read", "mapfile",
            "readarray", "getopts", "let", "alias"}  # fmt: skip
_MARK = "\0"  # encloses the number of what is not known in a value


@dataclass(frozen=True)
class _Part:
    """A part of a word: text, or what is expanded.

    Attributes:
        kind: "text", "variable", "arithmetic" or "command".
        text: the text, or what stands between the brackets.
        is_quoted: whether its spaces split no words.
    """

    kind: str
    text: str
    is_quoted: bool


@dataclass(frozen=True)
class _Token:
    """An operator, a word, or an assignment of an array.

    Attributes:
        line: its line.
        operator: the operator, or "".
        parts: the parts of the word.
        array: the words of the array; None if it is none. `parts` is then `NAME=` or `NAME+=`.
    """

    line: int
    operator: str = ""
    parts: tuple[_Part, ...] = ()
    array: tuple["_Token", ...] | None = None

    @property
    def plain(self) -> str:
        """The word if nothing in it is quoted or expanded, otherwise ""."""
        is_plain = all(p.kind == "text" and not p.is_quoted for p in self.parts)
        return "".join(part.text for part in self.parts) if is_plain else ""


def _refuse(line: int, what: str, remedy: str) -> NoReturn:
    raise ValueError(f"line {line}: {what}; {remedy}")


class _Lexer:
    """Splits a script into tokens."""

    def __init__(self, text: str, line: int = 1) -> None:
        self._text, self._at, self._line = text, 0, line

    def _peek(self, length: int = 1) -> str:
        return self._text[self._at : self._at + length]

    def _take(self, length: int = 1) -> str:
        taken = self._peek(length)
        self._at += length
        self._line += taken.count("\n")
        return taken

    def tokens(self) -> Iterator[_Token]:
        """Yield the tokens of the script."""
        while (token := self._next()) is not None:
            yield token

    def _next(self) -> _Token | None:
        while self._peek() and (self._peek() in " \t\r" or self._peek(2) == "\\\n"):
            self._take(2 if self._peek() == "\\" else 1)
        line = self._line
        if not self._peek():
            return None
        if self._peek() == "#":
            while self._peek() not in ("", "\n"):
                self._take()
            return self._next()
        if match := _REDIRECTION.match(self._text, self._at):
            self._take(len(match[0]))
            return _Token(line, ">")
        for mark in _OPERATORS:
            if self._peek(len(mark)) == mark:
                self._take(len(mark))
                return _Token(line, mark)
        parts = tuple(self.parts(lambda char: char in " \t\r\n|&;()<>"))
        token = _Token(line, parts=parts)
        if self._peek() == "(" and _ASSIGNMENT.fullmatch(token.plain):
            self._take()
            return _Token(line, parts=parts, array=tuple(self._array(line)))
        return token

    def _array(self, line: int) -> Iterator[_Token]:
        while (token := self._next()) is not None:
            if token.operator == ")":
                return
            if token.operator not in ("", "\n"):
                _refuse(token.line, f"{token.operator} in an array", "write a list of words there")
            if not token.operator:
                yield token
        _refuse(line, "the array has no end", "close its bracket")

    def parts(self, ends: Callable[[str], bool]) -> Iterator[_Part]:
        """Yield the parts of a word, up to the first character outside quotes that ends it."""
        while self._peek() and not ends(self._peek()):
            char, line = self._peek(), self._line
            if char == "\\":
                escaped = self._take(2)[1:]
                if escaped != "\n":
                    yield _Part("text", escaped, True)
            elif char == "'":
                self._take()
                yield _Part("text", self._until("'", line), True)
            elif char == '"':
                self._take()
                yield from self._double_quoted(line)
            elif char in "$`":
                yield self._expansion(is_quoted=False)
            else:
                yield _Part("text", self._take(), False)

    def _double_quoted(self, line: int) -> Iterator[_Part]:
        yield _Part("text", "", True)  # "" is a word
        while (char := self._peek()) != '"':
            if not char:
                _refuse(line, "a quotation has no end", "close it")
            if char == "\\" and self._peek(2)[1:] in ("$", "`", '"', "\\", "\n"):
                escaped = self._take(2)[1:]
                yield _Part("text", "" if escaped == "\n" else escaped, True)
            elif char in "$`":
                yield self._expansion(is_quoted=True)
            else:
                yield _Part("text", self._take(), True)
        self._take()

    def _until(self, end: str, line: int) -> str:
        taken = ""
        while self._peek(len(end)) != end:
            if not self._peek():
                _refuse(line, f"{end} is missing", "close the quotation or the bracket")
            taken += self._take()
        self._take(len(end))
        return taken

    def _expansion(self, is_quoted: bool) -> _Part:
        line = self._line
        if self._peek() == "`":
            self._take()
            return _Part("command", self._until("`", line), is_quoted)
        if self._peek(3) == "$((":
            self._take(3)
            part = _Part("arithmetic", self._balanced("()", line), is_quoted)
            if self._take() != ")":
                _refuse(line, "$(( has no ))", "close it")
            return part
        if self._peek(2) in ("$(", "${"):
            kind = "command" if self._take(2) == "$(" else "variable"
            return _Part(kind, self._balanced("()" if kind == "command" else "{}", line), is_quoted)
        self._take()
        match = re.compile(r"[A-Za-z_]\w*|\d|[@*#?$!-]").match(self._text, self._at)
        if match is None:
            return _Part("text", "$", is_quoted)
        return _Part("variable", self._take(len(match[0])), is_quoted)

    def _balanced(self, brackets: str, line: int) -> str:
        taken, depth = "", 1
        while True:
            char = self._take()
            if not char:
                _refuse(line, f"{brackets[1]} is missing", "close the bracket")
            depth += (char == brackets[0]) - (char == brackets[1])
            if depth == 0:
                return taken
            taken += char


@dataclass
class Launch:
    """The command that a script runs.

    Attributes:
        line: its line.
        launcher: the words before the program, as `torchrun --nproc_per_node 8`.
        program: the program, as `pretrain_gpt.py`.
        flags: the words after it.
    """

    line: int
    launcher: list[str]
    program: str
    flags: list[str]


@dataclass
class Script:
    """A script that has been followed to its end.

    Attributes:
        launch: the command that it runs.
        notes: what was left out or decided on the way, with lines.
        unknown: what values are not known, and why.
    """

    launch: Launch
    notes: list[str]
    unknown: list[str]

    def known(self, value: str) -> str:
        """Return a value of the launch.

        Raises:
            ValueError: it has a part that is not known.
        """
        if match := re.search(f"{_MARK}(\\d+){_MARK}", value):
            raise ValueError(self.unknown[int(match[1])])
        return value

    def is_known(self, value: str) -> bool:
        """Return whether the script says all of a value."""
        return _MARK not in value


def read_script(text: str, given: Mapping[str, str]) -> Script:
    """Follow a script up to the command that runs a program `pretrain_*.py`.

    Args:
        text: the script.
        given: variables, and arguments by their numbers; the script's assignments do not change
            them.

    Raises:
        ValueError: the script does something that is not followed, or has no such command.
    """
    tokens = list(_Lexer(text).tokens())
    shell = _Shell(dict(given))
    shell.run(tokens)
    if shell.launch is None:
        raise ValueError(
            "no line that is run starts a program pretrain_*.py; name the script that does"
        )
    return Script(shell.launch, shell.notes, shell.unknown)


@dataclass
class _Shell:
    given: dict[str, str]
    values: dict[str, list[str]] = field(default_factory=dict)  # an array has several, or none
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    launch: Launch | None = None
    _branches: list[str] = field(default_factory=list)  # of every open `if`: run, skip or done
    _has_ended: bool = False

    def run(self, tokens: list[_Token]) -> None:
        """Follow the commands of a script."""
        command: list[_Token] = []
        joined, status = "\n", True
        for token in [*tokens, _Token(tokens[-1].line if tokens else 1, "\n")]:
            if token.operator in ("", ">"):
                command.append(token)
                continue
            if token.operator not in ("\n", ";", "&&", "||", "|", "|&", "&"):
                what = "a function or subshell" if token.operator in "()" else "a here-document"
                _refuse(token.line, f"{what} cannot be followed", "write its commands out")
            if command:
                if joined == "&&" and not status or joined == "||" and status:
                    pass
                else:
                    status = self._command(command)
                command = []
            elif token.operator != "\n" and joined != "\n":
                _refuse(token.line, f"{token.operator} follows no command", "correct the script")
            if token.operator != "\n" or joined not in ("&&", "||"):
                joined = token.operator
        if self._branches:
            _refuse(tokens[-1].line, "an if has no fi", "close it")

    @property
    def _is_active(self) -> bool:
        return not self._has_ended and all(branch == "run" for branch in self._branches)

    def _command(self, tokens: list[_Token]) -> bool:
        """Follow a command, and return whether it succeeds."""
        first, line = tokens[0].plain, tokens[0].line
        if first in ("then", "else", "elif", "fi") and not self._branches:
            _refuse(line, f"{first} without if", "correct the script")
        if first == "then":
            return self._command(tokens[1:]) if len(tokens) > 1 else True
        if first == "if":
            is_active = self._is_active
            self._branches.append("skip")
            if is_active:
                self._branches[-1] = "run" if self._test(tokens[1:]) else "skip"
            else:
                self._branches[-1] = "done"
            return True
        if first in ("else", "elif"):
            self._next_branch(first, tokens[1:])
            return True
        if first == "fi":
            self._branches.pop()
            return True
        if first in _REFUSED:
            _refuse(line, f"{first} cannot be followed", "write its commands out")
        return self._simple(tokens) if self._is_active else True

    def _next_branch(self, word: str, rest: list[_Token]) -> None:
        if self._branches[-1] != "skip":
            self._branches[-1] = "done"
            return
        self._branches[-1] = "run"
        if word == "elif":
            is_run = self._is_active and self._test(rest)
            self._branches[-1] = "run" if is_run else "skip"
        elif rest:
            self._command(rest)

    def _simple(self, tokens: list[_Token]) -> bool:
        line = tokens[0].line
        if tokens[0].plain in ("[", "[[", "test"):
            return self._test(tokens)
        if tokens[0].plain in _DECLARE:
            tokens = [t for t in tokens[1:] if not t.plain.startswith("-")]
        while tokens and (match := self._assigned(tokens[0])):
            self._assign(tokens.pop(0), match)
        words, skip = [], False
        for token in tokens:
            if not skip and not token.operator:
                words += self._fields(token)
            skip = bool(token.operator)  # the file of a redirection
        if words:
            self._run(line, words)
        return True

    def _run(self, line: int, words: list[str]) -> None:
        if words[0] in ("echo", "printf"):
            return
        for index, word in enumerate(words):
            name = word.rpartition("/")[2]
            if re.fullmatch(r"(pretrain|train|finetune)_?\w*\.py", name):
                if self.launch is not None:
                    _refuse(line, f"a second program starts, {name}", "leave one of them out")
                self.launch = Launch(line, words[:index], name, words[index + 1 :])
                return
            if re.search(r"\bpretrain_\w+\.py\b", word):
                _refuse(line, "the program starts inside quotes", "write its command out")
        if words[0] == "exit":
            self._has_ended = True
        elif words[0] == "eval" or words[:2] == ["set", "--"]:
            _refuse(line, f"{words[0]} cannot be followed", "write out what it does")
        elif words[0] in ("source", "."):
            self.notes.append(f"line {line}: {' '.join(words)}: what it sets is not known")
        elif words[0] == "unset":
            for name in words[1:]:
                self.values.pop(name, None)

    def _assigned(self, token: _Token) -> re.Match[str] | None:
        head = ""
        for part in token.parts:
            if part.kind != "text" or part.is_quoted:
                break
            head += part.text
        return _ASSIGNMENT.match(head)

    def _assign(self, token: _Token, match: re.Match[str]) -> None:
        name, adds = match[1], bool(match[2])
        if name in self.given:
            return
        before = self.values.get(name, []) if adds else []
        if token.array is not None:
            added = [word for one in token.array for word in self._fields(one)]
            self.values[name] = [*before, *added]
            return
        parts, rest = [], len(match[0])
        for part in token.parts:  # without `NAME=`, a character of which is a part each
            if rest:
                rest -= len(part.text)
            else:
                parts.append(part)
        value = "".join(text for text, _ in self._expand(parts, token.line))
        self.values[name] = ["".join(before[:1]) + value, *before[1:]]

    def _test(self, tokens: list[_Token]) -> bool:
        """Return whether a test such as `[ -n "$NAME" ]` holds."""
        line = tokens[0].line
        bare = [token.plain for token in tokens]
        words = bare[1:-1] if bare and (bare[0], bare[-1]) in (("[", "]"), ("[[", "]]")) else None
        if words is None or any(t.operator for t in tokens):
            _refuse(line, "this condition cannot be followed", "leave one of its branches")
        values = [
            word or "".join(text for text, _ in self._expand(t.parts, line, in_test=True))
            for word, t in zip(words, tokens[1:-1], strict=True)
        ]
        for value in values:
            if _MARK in value:
                raise ValueError(self.unknown[int(value.split(_MARK)[1])])
        negated = values[:1] == ["!"]
        return self._holds(values[negated:], line) != negated

    def _holds(self, values: list[str], line: int) -> bool:
        numbers = {"-eq": operator.eq, "-ne": operator.ne, "-lt": operator.lt, "-le": operator.le,
                   "-gt": operator.gt, "-ge": operator.ge}  # fmt: skip
        match values:
            case ["-n", value] | [value]:
                return value != ""
            case ["-z", value]:
                return value == ""
            case [a, "=" | "==", b] if "*" not in b:
                return a == b
            case [a, "!=", b] if "*" not in b:
                return a != b
            case [a, sign, b] if sign in numbers and a.isdigit() and b.isdigit():
                return bool(numbers[sign](int(a), int(b)))
        _refuse(line, "this condition cannot be followed", "leave one of its branches")

    def _fields(self, token: _Token) -> list[str]:
        """Return the words that a word expands to."""
        fields: list[str | None] = [None]
        for text, splits in self._expand(token.parts, token.line):
            pieces = re.split(r"\s+", text) if splits else [text]
            for index, piece in enumerate(pieces):
                if index:
                    fields.append(None)
                if piece or not splits:
                    fields[-1] = (fields[-1] or "") + piece
        return [one for one in fields if one is not None]

    def _expand(
        self, parts: tuple[_Part, ...] | list[_Part], line: int, *, in_test: bool = False
    ) -> Iterator[tuple[str, bool]]:
        """Yield texts, and whether they are split at spaces. A space that splits is one of them."""
        for part in parts:
            if part.kind == "text":
                yield part.text, False
            elif part.kind == "command":
                why = f"line {line}: only the machine knows the result of $({part.text.strip()})"
                yield self._unknown(f"{why}; write the value into the script"), False
            elif part.kind == "arithmetic":
                yield self._arithmetic(part.text, line), False
            else:
                values = self._variable(part.text, line, in_test)
                if part.is_quoted and part.text.endswith("[*]"):
                    values = [" ".join(values)]
                for index, value in enumerate(values):
                    if index:
                        yield " ", True
                    yield value, not part.is_quoted

    def _unknown(self, why: str) -> str:
        self.unknown.append(why)
        return f"{_MARK}{len(self.unknown) - 1}{_MARK}"

    def _variable(self, text: str, line: int, in_test: bool) -> list[str]:
        match = _EXPANSION.fullmatch(text)
        if match is None:
            return [self._unknown(f"line {line}: ${{{text}}} cannot be followed; write its value")]
        name, index, sign, word = match["name"], match["index"], match["op"], match["word"]
        found = [self.given[name]] if name in self.given else self.values.get(name)
        if index not in (None, "[@]", "[*]"):
            return [self._unknown(f"line {line}: ${{{text}}} cannot be followed; write its value")]
        if index is None and found is not None:
            found = found[:1] or [""]
        is_set = found is not None and (not sign or ":" not in sign or "".join(found) != "")
        if sign and sign[-1] == "+":
            return [self._default(word, line)] if is_set else [""]
        if is_set and found is not None:
            return found
        if sign and sign[-1] in "-=":
            value = self._default(word, line)
            if sign[-1] == "=":
                self.values[name] = [value]
            return [value]
        if in_test:
            self.notes.append(
                f"line {line}: {name} is not set and counts as empty; --set {name}=VALUE sets it"
            )
            return [""]
        return [self._unknown(f"line {line}: ${name} is not set; give --set {name}=VALUE")]

    def _default(self, word: str, line: int) -> str:
        parts = list(_Lexer(word, line).parts(lambda char: False))
        return "".join(text for text, _ in self._expand(parts, line))

    def _arithmetic(self, text: str, line: int) -> str:
        parts = list(_Lexer(text, line).parts(lambda char: False))
        expression = "".join(value for value, _ in self._expand(parts, line))
        for name in sorted(set(_NAME.findall(expression)), key=len, reverse=True):
            value = self._variable(name, line, False)[0]
            expression = re.sub(rf"\b{name}\b", value, expression)
        if _MARK in expression:
            return _MARK + expression.split(_MARK)[1] + _MARK
        try:
            return str(_integer(ast.parse(expression.strip(), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError):
            _refuse(line, f"$(({text})) cannot be computed", "write its value into the script")


def _integer(node: ast.AST) -> int:
    """Return the value of an expression of integers, as bash computes it."""
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_integer(operand)
        case ast.BinOp(left=left, op=kind, right=right):
            a, b = _integer(left), _integer(right)
            if isinstance(kind, ast.Add | ast.Sub | ast.Mult):
                return {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}[type(kind)]
            quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
            if isinstance(kind, ast.Div):
                return quotient
            if isinstance(kind, ast.Mod):
                return a - quotient * b
    raise ValueError("not an expression of integers")
