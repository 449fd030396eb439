# SPDX-License-Identifier: Apache-2.0
"""The page fits together: script, markup and style name what exists, ask for the server's routes and nothing else."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from servers import scripted

import hourllava
from hourllava.serve.app import create_app

PAGE = Path(hourllava.__file__).parent / "serve" / "page"
MARKUP, STYLE, SCRIPT = ((PAGE / name).read_text() for name in ("index.html", "page.css", "page.js"))
ADDRESSES = {"action", "data", "formaction", "href", "ping", "poster", "src", "srcset"}
# What turns text into markup or code.
DANGEROUS = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|setHTML|document\.write|DOMParser|srcdoc"
    r"|\beval\b|\bFunction\(|javascript:|setAttribute\(\"(on|style)|set(Timeout|Interval)\(\s*[\"'`]"
)


class Markup(HTMLParser):
    """The elements of index.html with their attributes, and the text inside scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.inline = ""
        self._raw = False
        self.feed(MARKUP)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._raw = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        self.inline += data.strip() if self._raw else ""

    def values(self, name: str) -> list[str]:
        """Every value of an attribute, in order."""
        return [attributes[name] for _, attributes in self.elements if name in attributes]


PARSED = Markup()
IDS = PARSED.values("id")


def arguments(pattern: str) -> set[str]:
    """What the script gives to functions, as it is spelled there."""
    found = {argument.strip() for argument in re.findall(pattern, SCRIPT)}
    assert found, pattern
    return found


def literals(spelled: set[str]) -> set[str]:
    return {argument.strip('"') for argument in spelled if argument.startswith('"')}


def test_what_the_script_looks_up_exists() -> None:
    spelled = arguments(r"\b(?:byId|copyOf|dialog)\(([^()]*)\)")
    # All but the two helpers that hand a name on give it literally, so that it is seen here.
    assert {s for s in spelled if not s.startswith('"')} == {"id", "template"}
    assert literals(spelled) <= set(IDS)
    parts = arguments(r"\bpart\(\w+, ([^()]*)\)")
    assert all(s.startswith('"') for s in parts)
    assert literals(parts) == set(PARSED.values("data-part"))


def test_ids_are_unique_and_used_where_the_markup_names_them() -> None:
    assert sorted(IDS) == sorted(set(IDS))
    named = PARSED.values("for") + PARSED.values("aria-labelledby")
    assert named
    assert set(named) <= set(IDS)
    selectors = re.sub(r"\{[^{}]*\}", "", STYLE)
    styled = re.findall(r"#([a-z][\w-]*)", selectors)
    assert styled
    assert set(styled) <= set(IDS)


def test_controls_have_names_for_screen_readers() -> None:
    """An input has a label around it, before it or on it; the parser tells which by the order of the elements."""
    labelled, inside = set(PARSED.values("for")), re.findall(r"<label[^>]*>(.*?)</label>", MARKUP, re.DOTALL)
    fields = [a for tag, a in PARSED.elements if tag in ("input", "textarea")]
    assert fields
    for field in fields:
        around = [text for text in inside if "id" in field and f'id="{field["id"]}"' in text]
        assert around or field.get("id") in labelled or "aria-label" in field, field


def test_files_are_the_page_s_own() -> None:
    given = [value for name in ADDRESSES for value in PARSED.values(name)]
    files = {value for value in given if not value.startswith("data:")}
    assert files == {path.name for path in PAGE.iterdir()} - {"index.html"}
    assert re.findall(r"url\(|@import|image-set", STYLE) == []
    assert re.findall(r"\bimport\b|://|WebSocket|EventSource|sendBeacon|Worker\(", SCRIPT) == []


def test_policy_of_the_server_is_kept() -> None:
    """Its Content-Security-Policy lets no inline script or style through, and no text becomes markup."""
    assert "style" not in {tag for tag, _ in PARSED.elements}
    assert PARSED.inline == ""
    names = {name for _, attributes in PARSED.elements for name in attributes}
    assert {name for name in names if name.startswith("on") or name in ("style", "srcdoc")} == set()
    assert DANGEROUS.findall(SCRIPT) == []


@pytest.mark.parametrize("line", ["a.innerHTML = b", "eval(b)", "new Function(b)", 'a.setAttribute("onclick", b)'])
def test_dangerous_lines_are_seen(line: str) -> None:
    assert DANGEROUS.search(line)


def routes_asked() -> dict[str, tuple[str, str]]:
    table = SCRIPT.partition("const ROUTES = {")[2].partition("};")[0]
    return {name: (method, path) for name, method, path in re.findall(r'(\w+): "([A-Z]+) (\S+)"', table)}


def test_every_request_is_in_the_table_of_routes() -> None:
    table = SCRIPT.partition("const ROUTES = {")[2].partition("};")[0]
    assert len(routes_asked()) == len(table.strip().splitlines())
    assert "/v1" not in SCRIPT.replace(table, "")
    used = literals(arguments(r"\b(?:address|call|act)\((?:row, )?(\"\w+\")"))
    assert used | {"upload"} == set(routes_asked())
    # All requests go out in two places, and both take their address from the table.
    assert re.findall(r"\bfetch\(([^;]*);", SCRIPT) == ["address(route, name, query), options)"]
    assert re.findall(r"\.open\(([^;]*);", SCRIPT) == ['ROUTES.upload.split(" ")[0], address("upload", name))']


def test_routes_are_the_server_s() -> None:
    served = {
        (method.upper(), path)
        for path, methods in create_app(scripted().service).openapi()["paths"].items()
        for method in methods
    }
    assert served
    assert set(routes_asked().values()) <= served
