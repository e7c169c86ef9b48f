"""Chat templates as Hugging Face tokenizers keep them. The only file that renders Jinja.

The sandbox, its settings, filters and functions are those of transformers' `apply_chat_template`, so that the text is
the same. One thing is added: a template can be rendered with *marks*. In its own text, and in the variables that name
special tokens, each special token's name stands then as one private character, and `{% generation %}` blocks stand
between two more. What a message says never becomes a mark, whatever it spells and whatever it is joined with: so a
special id comes from the template, or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from megatron.config.errors import DataError
from megatron.corpora.chat_options import TemplateSource

PLANES = (0xF0000, 0x100000)  # private characters; a record that uses some itself is rendered with the other ones
_OPEN, _CLOSE, _FIRST = 0, 1, 2
_REASONING = ("reasoning_content", "thinking", "reasoning")


class RenderingFailed(Exception):
    """A template refuses a conversation, or cannot render it. Says why."""


class ChatTemplate:
    """A compiled template. special: ids by name of the tokenizer's special tokens.

    Raises DataError, with the line, for a template that is no Jinja.
    """

    def __init__(self, source: TemplateSource, special: Mapping[str, int]) -> None:
        self.source = source
        self.marks = [Marks(plane, special) for plane in PLANES]
        try:
            self._plain = _environment(source, "", "").from_string(source.text)
            self._marked = [_with_marks(source, marks) for marks in self.marks]
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{source.origin}: line {error.lineno}: the chat template is no Jinja: {error}") from None
        except (RecursionError, ValueError, OverflowError) as error:
            raise DataError(f"{source.origin}: the chat template cannot be compiled: {error}") from None
        self.has_generation = _has_generation(source)

    def mentions(self, word: str) -> bool:
        """Whether the template's text has the word: a template that does not name `tool_calls` cannot render any."""
        return word in self.source.text

    def plain(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None, prompt: bool = False) -> str:
        """The text as `apply_chat_template(…, tokenize=False)` gives it. prompt: with `add_generation_prompt`."""
        return self._render(self._plain, self.source.variables, messages, tools, prompt)

    def marked(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None, marks: Marks, prompt: bool = False
    ) -> str:
        """The same, with marks: one of `self.marks`, whose characters the conversation must not have."""
        variables = {name: marks.mark(value) for name, value in self.source.variables.items()}
        return self._render(self._marked[self.marks.index(marks)], variables, messages, tools, prompt)

    def _render(
        self,
        template: jinja2.Template,
        variables: Mapping[str, Any],
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any] | None,
        prompt: bool,
    ) -> str:
        try:
            return template.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=prompt,
                **variables,
            )
        except (MemoryError, DataError):
            raise
        except Exception as error:  # a template may raise whatever Python raises
            raise RenderingFailed(f"the chat template refuses the conversation: {error}") from None


class Marks:
    """Private characters for special tokens, and for the begin and the end of what the assistant generates."""

    def __init__(self, base: int, special: Mapping[str, int]) -> None:
        self.opened, self.closed = chr(base + _OPEN), chr(base + _CLOSE)
        self.plane = re.compile(f"[{chr(base)}-{chr(base + 0xFFFD)}]")
        names = sorted((name for name in special if name), key=len, reverse=True)
        self.names = {name: chr(base + _FIRST + number) for number, name in enumerate(names)}
        self.ids = {mark: special[name] for name, mark in self.names.items()}
        self._name_of = {mark: name for name, mark in self.names.items()}
        self.any_name = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self.any_mark = re.compile(f"[{''.join(map(re.escape, self.ids))}]" if self.ids else "(?!)")

    def mark(self, value: Any) -> Any:
        """Each name of a special token in a text as its mark; of other values, in the texts inside."""
        if isinstance(value, str):
            return self.any_name.sub(lambda found: self.names[found[0]], value)
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list) else value

    def restore(self, text: str) -> str:
        """The text with names instead of marks, and without the marks of generation."""
        without = text.replace(self.opened, "").replace(self.closed, "")
        return self.any_mark.sub(lambda found: self._name_of[found[0]], without)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: what stands between is what the assistant generates."""

    tags = {"generation"}
    opened = closed = ""

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    def _generated(self, caller: Any) -> str:
        return f"{self.opened}{caller()}{self.closed}"


class _Dict:
    """`dict(…)` without the class, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace(…)` that keeps no name with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _refuse_underscore(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not keep the attribute {name!r} on a namespace")


def _environment(source: TemplateSource, opened: str, closed: str) -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    generation: Any = made.extensions[_Generation.identifier]
    generation.opened, generation.closed = opened, closed

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        if not source.now:
            raise DataError(
                f"{source.origin}: the chat template writes the date (strftime_now), so that the same command would "
                "give other bytes tomorrow: give --chat-date YYYY-MM-DD"
            )
        return datetime.fromisoformat(source.now).strftime(form)

    made.filters["tojson"] = _to_json
    made.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=_Dict(), namespace=_Namespace)
    return made


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja's own escapes what HTML would misread
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under each name that templates read it by."""
    said = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if said is None else {"thinking": said, **message, "reasoning_content": said}


def _has_generation(source: TemplateSource) -> bool:
    tree = _environment(source, "", "").parse(source.text)
    calls = (block.call.node for block in tree.find_all(nodes.CallBlock))
    return any(isinstance(call, nodes.ExtensionAttribute) for call in calls)


def _with_marks(source: TemplateSource, marks: Marks) -> jinja2.Template:
    made = _environment(source, marks.opened, marks.closed)
    tree = made.parse(source.text)
    for output in tree.find_all(nodes.Output):
        for child in output.nodes:
            _mark_written(child, marks)
    for assigned in tree.find_all(nodes.Assign):
        _mark_written(assigned.node, marks)
    for keyword in tree.find_all(nodes.Keyword):
        _mark_written(keyword.value, marks)
    return jinja2.Template.from_code(made, made.compile(tree), made.make_globals(None))


def _mark_written(node: nodes.Node | None, marks: Marks) -> None:
    """Marks in the constants of an expression that reach the text: not in what is compared, searched or split at."""
    if isinstance(node, nodes.TemplateData):
        node.data = marks.mark(node.data)
    elif isinstance(node, nodes.Const):
        if isinstance(node.value, str):
            node.value = marks.mark(node.value)
    elif isinstance(node, nodes.Add | nodes.And | nodes.Or):
        _mark_written(node.left, marks)
        _mark_written(node.right, marks)
    elif isinstance(node, nodes.Concat):
        for child in node.nodes:
            _mark_written(child, marks)
    elif isinstance(node, nodes.CondExpr):
        _mark_written(node.expr1, marks)
        _mark_written(node.expr2, marks)
    elif isinstance(node, nodes.Filter | nodes.Getitem | nodes.Getattr):
        _mark_written(node.node, marks)
    elif isinstance(node, nodes.List | nodes.Tuple):
        for child in node.items:
            _mark_written(child, marks)
    elif isinstance(node, nodes.Dict):
        for pair in node.items:
            _mark_written(pair.value, marks)
    elif isinstance(node, nodes.Call):
        _mark_written(node.node, marks)
        if isinstance(node.node, nodes.Name):  # a macro; arguments of a string's methods are what it looks for
            for child in node.args:
                _mark_written(child, marks)
