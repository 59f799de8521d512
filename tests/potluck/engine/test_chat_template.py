"""Chat templates are other people's programs: their tricks are contained, and honest ones render as ever."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from potluck.engine.chat_template import TemplateRenderer
from potluck.engine.template_process import ChatTemplate, TooLarge
from transport.errors import BadCheckpoint, BadRequest, Busy, PotluckError

_CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": 'Hi "you" <b>'}]
_VARIABLES = {"add_generation_prompt": True, "tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>"}
_WITHIN_S = 1.0


@pytest.fixture
def renderer() -> Iterator[TemplateRenderer]:
    made = TemplateRenderer(_HONEST["marks"])
    yield made
    made.close()


_HONEST = {
    "marks": "{% for m in messages %}<|{{ m['role'] }}|>{{ m.content }}{{ eos_token }}{% endfor %}<|assistant|>",
    "blocks": (
        "{%- set ns = namespace(first=true) %}\n{% for m in messages %}\n    {% if loop.first %}\n{{ bos_token }}"
        "{% endif %}\n  {%- if m.role == 'system' %}{% set ns.first = false %}{% continue %}{% endif %}\n"
        "{{- m.content | trim | tojson(indent=2) }}\n{% endfor %}\n{{ ns.first }}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "macro": (
        "{% macro turn(m) %}[{{ m.role | upper }}] {{ caller() }}{% endmacro %}{% for m in messages %}"
        "{% call turn(m) %}{{ m.content.split(' ')[0] }}{% endcall %}{% endfor %}"
    ),
    "names": (
        "{{ dict(a=1) }}{{ dict.fromkeys(['x']) }}{{ range(3) | list }}{{ messages | length * 2 }}{{ 'ab' * 3 }}"
        "{{ 2 ** 10 }}{{ '%s-%s' % (1, 2) }}{{ messages[::-1][0].role }}{{ tools is none }}"
        "{{ (messages | map(attribute='role') | join(',')) }}{% if undefined_name is defined %}x{% endif %}"
    ),
    "break": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("name", _HONEST)
def test_honest_templates_render_as_transformers_renders_them(name: str) -> None:
    (expected,), _ = render_jinja_template(conversations=[_CHAT], chat_template=_HONEST[name], **_VARIABLES)
    assert ChatTemplate(_HONEST[name]).render({**_VARIABLES, "messages": _CHAT}) == expected


def test_the_process_renders_and_says_what_the_template_writes(renderer: TemplateRenderer) -> None:
    assert "<|assistant|>" in renderer.literals and "Be kind" not in renderer.literals
    assert renderer.render(_CHAT, _VARIABLES) == '<|system|>Be kind.</s><|user|>Hi "you" <b></s><|assistant|>'


def test_a_refusal_is_told() -> None:
    renderer = TemplateRenderer("{{ raise_exception('no systems here') }}")
    with pytest.raises(BadRequest, match="no systems here") as caught:
        renderer.render(_CHAT, _VARIABLES)
    assert caught.value.param == "messages"
    renderer.close()


# Ways out that work in Jinja without a sandbox, or worked in one of old: each would write a file.
_ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
    "{{ joiner.__init__.__globals__['os'].system('touch FILE') }}",
    "{{ self.__init__.__globals__.__builtins__.open('FILE', 'w') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ range.__class__ }}",
    "{{ (messages | attr('__class__')) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ ('{0.__class__}' | format(messages)) ~ '{0.__class__}'.format_map({'0': 1}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    "{% set x = namespace() %}{% set x.__class__ = 1 %}{{ x }}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages.clear() }}",
    "{{ lipsum.__globals__['os'].popen('touch FILE').read() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ __import__('os').system('touch FILE') }}",
]


@pytest.mark.parametrize("template", _ESCAPES)
def test_no_template_gets_out(template: str, tmp_path: Path) -> None:
    file = tmp_path / "made"
    try:
        found = ChatTemplate(template.replace("FILE", str(file))).render({**_VARIABLES, "messages": _CHAT})
    except Exception as error:  # noqa: BLE001
        found = str(error)
    assert not file.exists() and "root:" not in found and "<class" not in found and "0x" not in found
    assert _CHAT[0] == {"role": "system", "content": "Be kind."} and len(_CHAT) == 2


# Read, they never end, or take all memory.
_BOMBS = {
    "a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power of a power": "{{ messages | length ** 99999999 ** 9999999 }}",
    "digits": "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "doubling": "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "padding": "{{ 'a'.ljust(99999999999) }}",
    "a width": "{{ '%99999999999d' % 1 }}",
    "a format": "{{ '{:>99999999999}'.format(1) }}",
    "an indent": "{{ ('\\n' * 9999) | indent(9999999, true, true) }}",
    "lists": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "output": "{% for a in range(99999) %}{% for b in range(99) %}{{ 'aaaaaaaaaaaaaaaa' }}{% endfor %}{% endfor %}",
    "itself": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "sums": "{{ range(99999) | batch(1) | sum(start=[]) | length }}",
}


@pytest.mark.parametrize("name", _BOMBS)
def test_a_bomb_ends_in_a_clear_refusal_and_the_next_chat_is_served(name: str) -> None:
    template = "{% if messages[0].content == 'go off' %}" + _BOMBS[name] + "{% endif %}{{ messages[0].content }}"
    renderer = TemplateRenderer(template, within_s=_WITHIN_S)
    with pytest.raises(BadRequest, match="the model's chat template"):
        renderer.render([{"role": "user", "content": "go off"}], _VARIABLES)
    assert renderer.render([{"role": "user", "content": "hello"}], _VARIABLES) == "hello"
    renderer.close()


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9 ** 9 ** 99999 }}",
        "{{ 'a' * 9999999999999 }}",
        "{{ 'a'.ljust(99999999999) }}",
        "{{ [1] * 99999 * 99999 }}",
        "{% if %}",
        "{{ '\\ud800' }}",
        "(" * 9999,
        "{{ " + "(" * 9999 + ")" * 9999 + " }}",
        "x" * (2**20 + 1),
    ],
)
def test_a_bomb_in_its_constants_does_no_harm(template: str) -> None:
    renderer = TemplateRenderer(template, within_s=_WITHIN_S)
    try:
        assert renderer.render(_CHAT, _VARIABLES) == template
    except (BadCheckpoint, BadRequest) as error:
        assert "chat template" in error.message
    renderer.close()


def test_what_a_chat_may_take_grows_with_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potluck.engine.chat_template._SHORT_WITHIN_S", 0.2)
    renderer = TemplateRenderer("{% if messages %}" + _BOMBS["a loop"] + "{% endif %}", within_s=60.0)
    for length, within in ((10, "0.2"), (2**19, "0.5")):
        with pytest.raises(BadRequest, match=f"computed for more than {within} s"):
            renderer.render([{"role": "user", "content": "a" * length}], _VARIABLES)
    renderer.close()


def test_what_others_compute_is_not_held_against_a_chat() -> None:
    """One that takes half of its time is served on a machine that has four times as much to do as it can."""
    work = "{% for a in range(LOOPS) %}{% for b in range(1000) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    started_s = time.process_time()
    ChatTemplate(work.replace("LOOPS", "500")).render({"messages": _CHAT})
    loops = int(500 * 0.4 / (time.process_time() - started_s))
    count = 4 * (os.cpu_count() or 1)
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    renderer = TemplateRenderer(work.replace("LOOPS", str(loops)))
    try:
        assert renderer.render(_CHAT, _VARIABLES) == "Be kind."
    finally:
        for process in burning:
            process.kill()
            process.wait()
        renderer.close()


def test_its_process_is_small() -> None:
    code = "import sys, potluck.engine.template_process; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "jinja2" in loaded and not {"torch", "transformers", "tokenizers", "numpy", "zmq", "psutil"} & set(loaded)


def test_the_size_of_what_is_rendered_is_bounded() -> None:
    with pytest.raises(TooLarge):
        ChatTemplate("{% for i in range(99999) %}{{ messages }}{% endfor %}").render({"messages": "a" * 1000})


def test_a_process_that_died_is_replaced() -> None:
    before = set(_template_processes(os.getpid()))
    renderer = TemplateRenderer(_HONEST["marks"])
    (child,) = set(_template_processes(os.getpid())) - before
    renderer.render(_CHAT, _VARIABLES)
    child.kill()
    child.wait(60.0)
    assert renderer.render(_CHAT, _VARIABLES).startswith("<|system|>")
    renderer.close()


def test_a_slow_chat_does_not_hold_up_another() -> None:
    slow = "{% if messages[0].content == 'slow' %}" + _BOMBS["a loop"] + "{% endif %}{{ messages[0].content }}"
    others = set(_template_processes(os.getpid()))
    renderer = TemplateRenderer(slow, within_s=120.0)
    renderer.render([{"role": "user", "content": "first"}], _VARIABLES)
    (its_process,) = set(_template_processes(os.getpid())) - others
    ended: list[str] = []

    def ask(content: str) -> None:
        with contextlib.suppress(BadRequest):
            renderer.render([{"role": "user", "content": content}], _VARIABLES)
        ended.append(content)

    threads = [threading.Thread(target=ask, args=(content,)) for content in ("slow", "quick")]
    threads[0].start()
    _wait(lambda: not renderer._idle)
    threads[1].start()
    threads[1].join(60.0)
    assert ended == ["quick"]
    its_process.kill()  # It would go on for two minutes.
    threads[0].join(60.0)
    assert ended == ["quick", "slow"]
    renderer.close()


def test_many_slow_chats_hold_up_no_quick_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potluck.engine.chat_template._SHORT_WITHIN_S", 600.0)
    template = "{% if messages[0].content == 'slow' %}" + _BOMBS["a loop"] + "{% endif %}{{ messages[0].content }}"
    renderer = TemplateRenderer(template, within_s=600.0)
    refusals: list[PotluckError] = []

    def ask() -> None:
        with pytest.raises((Busy, BadRequest)) as caught:
            renderer.render([{"role": "user", "content": "slow"}], _VARIABLES)
        refusals.append(caught.value)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    _wait(lambda: len(refusals) == 5, 60.0)
    # One may go on, the others come again; and whoever the template is quick with is served.
    assert all(isinstance(refusal, Busy) for refusal in refusals)
    for number in range(10):
        assert renderer.render([{"role": "user", "content": f"{number}"}], _VARIABLES) == f"{number}"
    assert len(refusals) == 5
    renderer.close()
    for thread in threads:
        thread.join(60.0)
    assert isinstance(refusals[-1], BadRequest)


def test_several_threads_take_turns(renderer: TemplateRenderer) -> None:
    found: list[str] = []

    def ask(number: int) -> None:
        for _ in range(20):
            found.append(renderer.render([{"role": "user", "content": f"{number}"}], _VARIABLES))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert sorted(found) == sorted(f"<|user|>{number}</s><|assistant|>" for number in range(4) for _ in range(20))


def test_its_process_is_gone_with_its_parent_even_in_the_middle_of_a_bomb() -> None:
    code = (
        "from potluck.engine.chat_template import TemplateRenderer\n"
        "loop = '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}'\n"
        "renderer = TemplateRenderer(loop, within_s=4.0)\n"
        "print('ready', renderer.literals, flush=True)\n"
        "renderer.render([], {})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline().startswith(b"ready")
    (child,) = _template_processes(parent.pid)
    before_s = child.cpu_times().user
    _wait(lambda: child.cpu_times().user > before_s + 0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait(60.0)
    parent.stdout.close()
    child.wait(60.0)


def _template_processes(parent: int) -> list[psutil.Process]:
    children = psutil.Process(parent).children()
    return [child for child in children if "potluck.engine.template_process" in child.cmdline()]


def _wait(true: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
