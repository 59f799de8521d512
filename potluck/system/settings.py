"""Settings: one definition is the field, the file's key, the option of every command, its help and its default."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from planner.options import STRATEGIES, parse_layers
from potluck.system.byte_sizes import AN_AMOUNT, exact_bytes, parse_bytes
from transport.errors import ConfigError
from transport.messages.ring import KVForm

DEFAULT_PORT = 11500
DEFAULT_CONTEXT_TOKENS = 4096
QUANTIZE = ("stored", "dense", "8", "4", "auto")
KV_CACHE: tuple[KVForm, ...] = get_args(KVForm)

Kind = Literal["text", "number", "switch", "bytes", "texts"]
_TYPES: dict[Kind, type] = {"text": str, "number": int, "switch": bool, "bytes": int, "texts": tuple}


def _setting(
    default: Any,
    help_text: str,
    *,
    unset: str = "",
    example: Any = None,
    former: tuple[str, ...] = (),
    **limits: Any,
) -> Any:
    """A field of Settings with its `Setting`, whose name and kind the field has already."""
    metadata = {"help": help_text, "unset": unset, "example": example, "former": former, **limits}
    return field(default=default, metadata=metadata)


def _check_address(text: str) -> None:
    try:
        valid = text == "localhost" or ("%" not in text and bool(ip_address(text)))
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(
            f"expected an address of this host, got {text!r}, which is no address",
            hint="use 127.0.0.1, an address of this host, or 0.0.0.0 for all of them",
        )


def _check_host_name(text: str) -> None:
    if not text.strip() or "/" in text:
        raise ConfigError(f"expected a name without a slash, got {text!r}", hint="choose a name such as den")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `potluck up` needs to know. None, and a list without items, mean what `unset` says."""

    model: str | None = _setting(None, "A model of the store, or a source to pull.", example="smollm2")
    offline: bool = _setting(
        False,
        "Take models from this host and the pool; ask no hub and no package index. HF_HUB_OFFLINE=1 says it too.",
    )
    device: tuple[str, ...] = _setting(
        (),
        "A device of this host to use, such as torch:cpu, cuda:0, mps or mlx.",
        unset="all that this host has",
        example=["torch:cpu", "mlx"],
        former=("devices",),
    )
    memory: int | None = _setting(
        None,
        'Most memory that each device gives, such as "8GiB".',
        is_bytes=True,
        minimum=1,
        unset="what is free",
        example=8 * 2**30,
        former=("memory_bytes",),
    )
    threads: int | None = _setting(
        None,
        "Threads that the workers on this host's CPU have together, at least one each.",
        minimum=1,
        unset="its physical cores",
        example=4,
    )
    context: int | None = _setting(
        None,
        "Tokens of context.",
        minimum=1,
        unset=f"{DEFAULT_CONTEXT_TOKENS}, or the model's if less",
        example=8192,
        former=("context_tokens",),
    )
    concurrency: int = _setting(4, "Chats of full context that KV memory is reserved for.", minimum=1)
    quantize: str = _setting(
        "stored",
        "How stages hold matrices: stored (as in the file), dense, 8 or 4 (what the file has dense in so many bits), "
        "or auto (the first of stored, 8 and 4 that fits).",
        choices=QUANTIZE,
    )
    kv_cache: str = _setting(
        "full",
        "How stages hold the KV of chats: full (in what they compute in), or 8-bit, about half of that: answers then "
        "differ a little.",
        choices=KV_CACHE,
    )
    prefix_cache: bool = _setting(
        True, "Keep the KV of earlier prompts for those that begin alike, instead of computing every prompt again."
    )
    host: str = _setting(
        "127.0.0.1",
        "The endpoint's address; 0.0.0.0 serves this host's network, with an API key.",
        check=_check_address,
    )
    port: int = _setting(DEFAULT_PORT, "The endpoint's port; 0 for any free one.", minimum=0, maximum=65535)
    require_key: bool = _setting(False, "Ask programs of this host for the API key too; see: potluck key.")
    allow_host: tuple[str, ...] = _setting(
        (),
        "Another name that the endpoint answers to.",
        unset="this host's own",
        example=["potluck.home"],
        former=("allowed_hosts",),
        adds=True,
    )
    allow_origin: tuple[str, ...] = _setting(
        (),
        "Another origin whose pages may ask the endpoint, such as http://localhost:3000.",
        unset="its own",
        example=["http://localhost:3000"],
        former=("allowed_origins",),
        adds=True,
    )
    objective: str = _setting(
        "auto",
        "What the plan is best at: auto (that many chats), latency (one chat), throughput; or a simple rule: "
        "proportional (to bandwidth), memory, even.",
        choices=STRATEGIES,
    )
    layers: str | None = _setting(
        None,
        'Layers by hand, in the ring\'s order, such as "mac=20,gpu=12".',
        unset="as the objective says",
        example="mac=20,gpu=12",
        check=parse_layers,
    )
    use_all: bool = _setting(
        False, "Give every device a stage, also where it slows the others down.", former=("use_all_devices",)
    )
    fresh: bool = _setting(False, "Measure devices and links again.")
    estimate: bool = _setting(
        False, "Plan from bandwidths, without measuring layers and links: quicker, and less exact."
    )
    measure_in_turn: bool = _setting(False, "Measure one device at a time, for hosts that share a machine.")
    wait_for: int = _setting(
        0, "Wait until this many devices are in the pool.", minimum=0, former=("wait_for_devices",)
    )
    lan: bool = _setting(True, "Let other hosts join over the network; without it nothing listens there.")
    discovery: bool = _setting(True, "Announce the pool on the network, and look for one there.")
    approve_all: bool = _setting(
        False, "Accept hosts that know the code or the invite, without asking here.", former=("yes",), spelling="--yes"
    )
    lan_host: str | None = _setting(
        None, "This host's IPv4 address for the others.", unset="found out", example="192.168.1.20"
    )
    lan_port: int | None = _setting(
        None,
        "The pairing port, where other hosts reach this head; 0 for any free one.",
        minimum=0,
        maximum=65535,
        unset="11501, or any free one if that is taken",
        example=11501,
    )
    host_name: str | None = _setting(
        None, "This host's name in the pool.", unset="the system's", example="den", check=_check_host_name
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The definition of a field of Settings. `former`: keys of earlier versions, still read; `adds`: what the command
    line says comes on top of what the file says; `spelling`: another option."""

    name: str
    kind: Kind
    default: Any
    help: str
    unset: str = ""
    example: Any = None
    former: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    maximum: int | None = None
    check: Callable[[str], object] | None = None
    adds: bool = False
    spelling: str = ""

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def options(self) -> tuple[str, ...]:
        """As typer takes them."""
        spelled = (self.option, self.spelling) if self.spelling else (self.option,)
        return (f"{self.option}/--no-{self.option[2:]}", *spelled[1:]) if self.kind == "switch" else spelled

    @property
    def default_text(self) -> str:
        return self.unset if self.default in (None, ()) else self.text(self.default)

    def text(self, value: Any) -> str:
        """A value as TOML has it."""
        if isinstance(value, (bool, int)):
            return f'"{exact_bytes(value)}"' if self.kind == "bytes" else json.dumps(value)
        if isinstance(value, str) and "\\" in value and "'" not in value:
            return f"'{value}'"
        return json.dumps(value, ensure_ascii=False, default=str)

    @property
    def expected(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind == "number" and self.maximum is not None:
            return f"a whole number from {self.minimum} to {self.maximum}"
        words = {"text": "a text in quotes", "switch": "true or false", "texts": "a list of texts", "bytes": AN_AMOUNT}
        return words.get(self.kind, f"a whole number of at least {self.minimum}")


def _kind_of(hint: object, metadata: Mapping[str, Any]) -> Kind:
    if metadata.get("is_bytes"):
        return "bytes"
    kinds: dict[object, Kind] = {bool: "switch", int: "number", int | None: "number", tuple[str, ...]: "texts"}
    return kinds.get(hint, "text")


def _definitions() -> dict[str, Setting]:
    hints = get_type_hints(Settings)
    return {
        each.name: Setting(
            name=each.name,
            kind=_kind_of(hints[each.name], each.metadata),
            default=each.default,
            **{key: value for key, value in each.metadata.items() if key != "is_bytes"},
        )
        for each in fields(Settings)
    }


SETTINGS: Mapping[str, Setting] = _definitions()


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenValue:
    """What the file or the command line says, and as what: the file's key, or the option."""

    said_as: str
    value: Any


def load_settings(path: Path, said: Mapping[str, Any] | None = None) -> Settings:
    """Those of the file, if it is there, with what the command line says on top. Raises ConfigError."""
    return settings_of(given_values(path, said or {}))


def settings_of(given: Mapping[str, GivenValue]) -> Settings:
    return replace(Settings(), **{name: each.value for name, each in given.items()})


def given_values(path: Path, said: Mapping[str, Any]) -> dict[str, GivenValue]:
    """By setting's name, what the file says, and `said` on top of it, where None and () say nothing. Raises
    ConfigError."""
    given = read_settings_file(path)
    for name, value in said.items():
        if value is None or value in ((), []):
            continue
        setting = SETTINGS[name]
        checked = _checked(setting, value, f"{setting.option} {_one_line(value)}")
        if setting.adds and name in given:
            checked = (*given[name].value, *checked)
        given[name] = GivenValue(said_as=setting.option, value=checked)
    if said.get("lan_host") is not None and said.get("lan") is None:
        # Whoever says where other hosts reach this one wants them to.
        given["lan"] = GivenValue(said_as=SETTINGS["lan_host"].option, value=True)
    return given


def read_settings_file(path: Path) -> dict[str, GivenValue]:
    """By setting's name; nothing if there is no file. Raises ConfigError for what it can't hold."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", hint="it must be a TOML file") from error
    text = _decoded(content, path)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} can't be read: {error}", hint=_toml_hint(text, str(error))) from error
    return parse_settings(data, where=str(path))


def parse_settings(data: Mapping[str, Any], *, where: str) -> dict[str, GivenValue]:
    """A file's keys and values. Raises ConfigError."""
    given: dict[str, GivenValue] = {}
    for key, value in data.items():
        setting, value = _setting_of(key, value, where)
        if setting.name in given:
            raise ConfigError(
                f"{where}: {given[setting.name].said_as} and {key} are the same setting",
                hint=f"keep {setting.name} alone",
            )
        checked = _checked(setting, value, f"{where}: {key} = {_one_line(value)}")
        given[setting.name] = GivenValue(said_as=key, value=checked)
    return given


def _setting_of(key: str, value: Any, where: str) -> tuple[Setting, Any]:
    """The setting that a key of the file means, and what the key says of it: an option's name is a key too, so that
    `use-all` is `use_all` and `no_lan = true` is `lan = false`."""
    name = key.replace("-", "_")
    for setting in SETTINGS.values():
        if name == setting.name or name in setting.former:
            return setting, value
    turned = SETTINGS.get(name.removeprefix("no_"))
    if turned is not None and turned.kind == "switch" and isinstance(value, bool):
        return turned, not value
    if isinstance(value, dict):
        raise ConfigError(f"{where}: [{key}] is a table, and settings are in none", hint=f"leave the line [{key}] out")
    known = {other: setting.name for setting in SETTINGS.values() for other in (setting.name, *setting.former)}
    near = difflib.get_close_matches(name, known, n=1)
    did_you_mean = f"; did you mean {known[near[0]]!r}?" if near else ""
    raise ConfigError(
        f"{where}: unknown key {key!r}{did_you_mean}", hint=f"the keys are: {', '.join(sorted(SETTINGS))}"
    )


def _checked(setting: Setting, value: Any, said: str) -> Any:
    """The value as Settings has it. Raises ConfigError, in which `said` is what was said."""
    if setting.kind == "texts":
        value = tuple(value) if isinstance(value, list | tuple) else (value,)
    for text in value if setting.kind == "texts" else (value,):
        if isinstance(text, str) and any(unicodedata.category(char) == "Cc" for char in text):
            # "C:\temp\new.gguf" has a tab and a line's end in it.
            raise ConfigError(
                f"{said}: expected a text without control characters, got {text!r}",
                hint=f"write a path in single quotes: {setting.name} = '{_escaped(text)}'",
            )
    if setting.choices and type(value) is int:
        value = str(value)  # quantize = 8
    if setting.kind == "bytes" and (isinstance(value, str) or type(value) in (int, float)):
        value = _within(said, parse_bytes, str(value))
    is_of_kind = type(value) is _TYPES[setting.kind]
    if setting.kind == "texts":
        is_of_kind = all(isinstance(text, str) for text in value)
    if not is_of_kind or not _is_allowed(setting, value):
        raise ConfigError(f"{said}: expected {setting.expected}", hint=_value_hint(setting))
    if setting.check is not None:
        _within(said, setting.check, value)
    return value


def _within(said: str, parse: Callable[[str], Any], text: str) -> Any:
    """What `parse` makes of the text. Its ConfigError then says where the text is."""
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{said}: {error.message}", hint=error.hint) from error


def _is_allowed(setting: Setting, value: Any) -> bool:
    if setting.choices:
        return value in setting.choices
    return (setting.minimum is None or value >= setting.minimum) and (
        setting.maximum is None or value <= setting.maximum
    )


def _value_hint(setting: Setting) -> str:
    shown = setting.default if setting.example is None else setting.example
    return f"for example {setting.name} = {setting.text(shown)}; potluck config {setting.name} says more"


def _one_line(value: Any) -> str:
    """A value in an error's text, as it was written as far as possible."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return _escaped(text if len(text) <= 80 else f"{text[:79]}…")


def _escaped(text: str) -> str:
    return "".join(repr(char)[1:-1] if unicodedata.category(char) == "Cc" else char for char in text)


def _decoded(content: bytes, path: Path) -> str:
    """A mark of UTF-8 at the beginning, as editors of Windows write it, is passed over. Raises ConfigError."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content:
        raise ConfigError(f"{path} can't be read: expected UTF-8, got UTF-16", hint='save it again, as "UTF-8"')
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path} can't be read: line {line} is not UTF-8", hint='save it again, as "UTF-8"'
        ) from error


_LINE = re.compile(r"at line (\d+)")
_PAIR = re.compile(r"\s*([\w-]+)\s*=\s*(.*)")


def _toml_hint(text: str, error: str) -> str:
    """What to write instead in the line that the error names."""
    number = _LINE.search(error)
    line = text.splitlines()[int(number[1]) - 1] if number else (text.splitlines() or [""])[-1]
    pair = _PAIR.match(line)
    if pair is None:
        return 'write a setting a line, such as port = 11500 or model = "smollm2"'
    key, value = pair[1], pair[2].strip()
    if value.startswith('"') and "\\" in value:
        return f"write a path in single quotes: {key} = '{value.strip(chr(34))}'"
    if value.lower() in ("true", "false"):
        return f"write {key} = {value.lower()}"
    if value and value[0] not in "\"'[{":
        return f'write a text in straight quotes: {key} = "{value.strip("“”„‘’")}"'
    return f"see that all quotes and brackets of {key} are closed"
