"""Settings from a file: the README's example and every name load, and what is wrong is said with what to write."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from potluck.system.byte_sizes import exact_bytes, parse_bytes
from potluck.system.settings import SETTINGS, Setting, Settings, load_settings, parse_settings, settings_of
from transport.errors import ConfigError

README = Path(__file__).parents[3] / "README.md"
GIB = 2**30


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def loaded(file: Path, content: str | bytes) -> Settings:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_settings(file)


def error_of(file: Path, content: str | bytes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        loaded(file, content)
    assert str(file) in caught.value.message and caught.value.hint
    return caught.value


def test_there_need_be_no_file(file: Path) -> None:
    assert load_settings(file) == load_settings(file / "below") == Settings()


def test_the_readme_s_settings_load(file: Path) -> None:
    blocks: list[str] = re.findall(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        found = loaded(file, block)
        assert (found.model, found.context, found.memory) == ("smollm2", 4096, 8 * GIB)
        assert (found.device, found.quantize, found.kv_cache) == (("torch:cpu", "mlx"), "auto", "8-bit")


def test_the_field_s_first_evening_file_loads(file: Path) -> None:
    assert loaded(file, 'model = "smollm2"\ncontext = 4096\n') == Settings(model="smollm2", context=4096)


def example_of(setting: Setting) -> Any:
    """A value that is not the default, as TOML has it."""
    if setting.kind == "switch":
        return not setting.default
    if setting.choices:
        return next(choice for choice in setting.choices if choice != setting.default)
    examples = {"host": "0.0.0.0", "port": 11600, "concurrency": 2, "wait_for": 3, "memory": "8GiB"}
    return examples.get(setting.name, setting.example)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_name_of_a_setting_is_a_key(setting: Setting) -> None:
    value = example_of(setting)
    names = {setting.name, setting.option.removeprefix("--"), *setting.former}
    found = [settings_of(parse_settings({name: value}, where="config.toml")) for name in names]
    assert all(each == found[0] for each in found) and getattr(found[0], setting.name) != setting.default
    if setting.kind == "switch":
        for negated in (f"no_{setting.name}", f"no-{setting.option.removeprefix('--')}"):
            assert settings_of(parse_settings({negated: not value}, where="config.toml")) == found[0]
    for other in names - {setting.name}:
        with pytest.raises(ConfigError, match="the same setting"):
            parse_settings({setting.name: value, other: value}, where="config.toml")


@pytest.mark.parametrize(
    ("former", "name"),
    [
        ("context_tokens", "context"),
        ("memory_bytes", "memory"),
        ("allowed_hosts", "allow_host"),
        ("allowed_origins", "allow_origin"),
        ("use_all_devices", "use_all"),
        ("wait_for_devices", "wait_for"),
        ("devices", "device"),
        ("yes", "approve_all"),
    ],
)
def test_keys_of_before_still_load(former: str, name: str) -> None:
    assert former in SETTINGS[name].former


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_value_as_it_is_shown_loads_again(file: Path, setting: Setting) -> None:
    value = getattr(loaded(file, f"{setting.name} = {setting.text(_python(setting))}\n"), setting.name)
    assert value == getattr(loaded(file, f"{setting.name} = {setting.text(value)}\n"), setting.name)


def _python(setting: Setting) -> Any:
    return 8 * GIB if setting.kind == "bytes" else example_of(setting)


@pytest.mark.parametrize("name", [setting.name for setting in SETTINGS.values() if setting.kind == "bytes"])
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("8", "8GiB"),
        ('"8"', "8GiB"),
        ("1.5", "1.5GiB"),
        ("4096", "4096MiB"),
        (str(8 * GIB), "8GiB"),
        ('"12345678"', None),
    ],
)
def test_a_bare_number_is_no_amount_of_bytes(file: Path, name: str, written: str, meant: str | None) -> None:
    error = error_of(file, f"{name} = {written}\n")
    assert f"{name} = " in error.message and "with a unit" in error.message
    assert error.hint == f'did you mean "{meant or "12345678B"}"?'


@pytest.mark.parametrize(
    "text",
    ["8", "0", "1e9", "-1GiB", "nan", "inf", "infGiB", "1e400GB", "9" * 400 + "GB", "", "GiB", "8 G i B", "1_0GB"],
)
def test_what_is_no_amount_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected"):
        parse_bytes(text)


def test_amounts() -> None:
    amounts = {
        "8GiB": 8 * GIB,
        "8G": 8 * GIB,
        "500 MB": 5 * 10**8,
        "1.5gib": 3 * GIB // 2,
        "12345B": 12345,
        "1TB": 10**12,
    }
    assert {text: parse_bytes(text) for text in amounts} == amounts
    for num_bytes in (1, 12345, 2**10, 404 * 2**20, 5 * 10**8, 8 * GIB, 10**12, 2**50 + 1):
        assert parse_bytes(exact_bytes(num_bytes)) == num_bytes


def test_a_mark_of_utf_8_is_passed_over(file: Path) -> None:
    assert loaded(file, b'\xef\xbb\xbfmodel = "smollm2"\n').model == "smollm2"


def test_another_encoding_is_named(file: Path) -> None:
    for encoding in ("utf-16", "utf-16-le"):
        error = error_of(file, 'model = "smollm2"\n'.encode(encoding))
        assert "UTF-16" in error.message and "UTF-8" in error.hint
    error = error_of(file, 'port = 1\nhost_name = "Küche"\n'.encode("latin-1"))
    assert "line 2" in error.message and "UTF-8" in error.hint


@pytest.mark.parametrize("path", [r"C:\Users\me\m.gguf", r"C:\temp\new.gguf", r"D:\models\x\m.gguf", r"C:\new"])
def test_a_windows_path_in_double_quotes_gets_single_ones(file: Path, path: str) -> None:
    assert f"model = '{path}'" in error_of(file, f'model = "{path}"\n').hint
    assert loaded(file, f"model = '{path}'\n").model == path


@pytest.mark.parametrize("setting", [each for each in SETTINGS.values() if each.kind in ("text", "texts")], ids=str)
def test_no_text_has_a_control_character(setting: Setting) -> None:
    for text in ("a\tb", "a\x1b[2J", "a\nb"):
        with pytest.raises(ConfigError, match="control characters") as caught:
            parse_settings({setting.name: [text] if setting.kind == "texts" else text}, where="config.toml")
        assert not set("\t\x1b\n") & set(str(caught.value.message))


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("prot", "port"),
        ("modle", "model"),
        ("contxt", "context"),
        ("context_size", None),
        ("alow-host", "allow_host"),
        ("quantise", "quantize"),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, key: str, near: str | None) -> None:
    error = error_of(file, f"{key} = 1\n")
    assert repr(key) in error.message and "port" in error.hint
    if near is not None:
        assert f"did you mean {near!r}?" in error.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("lan = False\n", "write lan = false"),
        ("model = smollm2\n", 'model = "smollm2"'),
        ("model = “smollm2”\n", 'model = "smollm2"'),
        ("port\n", "port = 11500"),
        ('device = ["mlx"\n', "brackets"),
        ("[up]\nport = 1\n", "leave the line [up] out"),
        ("port = 70000\n", "port = 11500"),
        ("port = -1\n", "port"),
        ("port = true\n", "port"),
        ('port = "11500"\n', "port = 11500"),
        ("threads = 0\n", "threads = 4"),
        ("context = 1.5\n", "context"),
        ("lan = 1\n", "lan = true"),
        ('lan = "yes"\n', "lan = true"),
        ('objective = "fast"\n', "objective"),
        ("device = [1]\n", "device = ["),
        ('host = "mymac.local"\n', "0.0.0.0"),
        ('host_name = "a/b"\n', "den"),
        ('layers = "mac"\n', "mac=20,gpu=12"),
        ("memory = true\n", "8GiB"),
        ("port = 2020-01-01\n", "port"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_write(file: Path, content: str, words: str) -> None:
    assert words in error_of(file, content).hint


def test_one_text_is_a_list_and_a_choice_may_be_a_number(file: Path) -> None:
    assert loaded(file, 'device = "mlx"\nquantize = 8\n') == Settings(device=("mlx",), quantize="8")


def test_the_command_line_comes_on_top(file: Path) -> None:
    file.write_text('port = 1\nallow_host = ["a"]\ndevice = ["mlx"]\noffline = true\nlan = false\n', encoding="utf-8")
    said = {
        "port": 2,
        "allow_host": ["b"],
        "device": ["torch:cpu"],
        "offline": False,
        "context": None,
        "allow_origin": [],
    }
    assert load_settings(file, said) == Settings(port=2, allow_host=("a", "b"), device=("torch:cpu",), lan=False)
    assert load_settings(file, {"lan_host": "192.0.2.1"}).lan
    assert not load_settings(file, {"lan_host": "192.0.2.1", "lan": False}).lan
    for bad, words in (
        ({"memory": "8"}, "--memory 8: "),
        ({"port": 70000}, "--port 70000: "),
        ({"quantize": "3"}, "--quantize 3: "),
    ):
        with pytest.raises(ConfigError) as caught:
            load_settings(file, bad)
        assert caught.value.message.startswith(words) and caught.value.hint


def test_every_setting_has_help_and_says_what_its_default_is() -> None:
    for setting in SETTINGS.values():
        assert setting.help.endswith(".") and setting.expected
        assert setting.default_text or setting.name == "model"
        if setting.default in (None, ()):
            assert tomllib.loads(f"{setting.name} = {setting.text(setting.example)}")
