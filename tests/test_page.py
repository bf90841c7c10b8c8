"""The page in a real browser: drop, watch it being read, write, watch it being written, stop."""
# ruff: noqa: E402

import socket
import threading

import pytest

uvicorn = pytest.importorskip("uvicorn")

import browser
from butterfly_llm.engine import Engine
from butterfly_llm.serve import create_app
from serving import Slow, events, model, served, until

__all__ = ["model"]  # a fixture
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(browser.FOUND is None, reason="no Chromium here: apt-get install chromium"),
]
WATCH = """
    window.seen = {bar: new Set(), text: new Set(), heard: new Set(), tree: new Set(), bars: new Set()};
    setInterval(() => {
      seen.bar.add(document.getElementById("bar").value);
      seen.text.add(document.getElementById("out").textContent.length);
      seen.heard.add(document.getElementById("position").textContent);
      seen.tree.add(document.getElementById("tree").toDataURL());
      seen.bars.add(document.getElementById("bars").toDataURL());
    }, 15);
"""


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    """(browser with the page open, engine): the server listens on a port of this machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    with Engine(Slow(model, 0.01), slots=4, slice_chars=64) as engine:
        server = uvicorn.Server(uvicorn.Config(create_app(engine), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        chromium = browser.Browser(tmp_path_factory.mktemp("profile"))
        chromium.address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        yield chromium, engine
        chromium.close()
        server.should_exit = True
        thread.join(10)


def fresh(page):
    chromium, engine = page
    until(lambda: engine.active == 0)
    chromium.open(chromium.address)
    chromium.until("document.getElementById('about')?.textContent.includes('layers')")
    chromium.run(WATCH)
    return chromium, engine


def value(chromium, name):
    return chromium.run(f"document.getElementById({name!r}).value")


def text(chromium, name):
    return chromium.run(f"document.getElementById({name!r}).textContent")


def seen(chromium, name):
    return chromium.run(f"[...seen.{name}]")


def test_a_dropped_project_is_read_and_continued_before_the_eyes(page, model, tmp_path):
    chromium, engine = fresh(page)
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / ".git" / "HEAD").write_text("not this")
    (project / "b.py").write_text("print('\u20ac')\n" * 300)
    (project / "a.txt").write_text("text\r\n" * 100)
    (project / "picture.bin").write_bytes(bytes(range(256)))
    chromium.drop([project], 200, 150)
    chromium.until("document.getElementById('reading').textContent.includes('characters read in')", 40)
    expected = "==> project/a.txt <==\n" + "text\n" * 100 + "==> project/b.py <==\n" + "print('?')\n" * 300
    (context,) = engine.contexts.values()
    assert context.characters == len(expected)
    assert "300 characters outside Latin-1 became ?" in text(chromium, "reading")
    assert len([each for each in seen(chromium, "bar") if 0 < each < 1]) > 1, "progress was not to be seen"
    chromium.until(f"document.getElementById('position').textContent == '{len(expected) - 1:,}'")

    chromium.run(
        "document.getElementById('count').value = 60; document.getElementById('temperature').value = 0"
    )
    chromium.run("document.getElementById('prompt').focus()")
    chromium.key("Enter", modifiers=2)
    chromium.until("document.getElementById('writing').textContent.includes('ended by length')", 40)
    between = [
        length for length in seen(chromium, "text") if len("def main(") < length < len("def main(") + 60
    ]
    assert len(between) > 1, "the text came all at once"
    assert (
        len(seen(chromium, "heard")) > 5
        and len(seen(chromium, "tree")) > 3
        and len(seen(chromium, "bars")) > 3
    )
    with served(model) as (call, _):
        asked = {"prompt": expected + "def main(", "max_tokens": 60, "temperature": 0, "stream": True}
        parts = events(call("POST", "/v1/completions", asked))
    assert text(chromium, "out") == "def main(" + "".join(part["choices"][0]["text"] for part in parts)
    assert "hears itself and, level by level, chunk" in text(chromium, "heard")
    assert "of the attention goes to partner chunks" in text(chromium, "shares")
    assert chromium.complaints == []


def test_stop_ends_the_stream_on_the_server_too(page):
    chromium, engine = fresh(page)
    before = engine.counters.finished["cancelled"]
    chromium.run("document.getElementById('count').value = 5000")
    assert chromium.run("document.getElementById('stop').disabled")
    chromium.run("document.getElementById('write').click()")
    chromium.until("document.getElementById('out').textContent.length > 20")
    chromium.key("Escape")
    chromium.until("document.getElementById('stop').disabled")
    until(lambda: engine.active == 0 and engine.counters.finished["cancelled"] == before + 1)
    assert not chromium.run("document.getElementById('write').disabled") and text(chromium, "error") == ""


def test_what_the_server_refuses_is_said_on_the_page(page):
    chromium, _ = fresh(page)
    chromium.run("document.getElementById('prompt').value = 'price: \\u20ac'")
    chromium.run("document.getElementById('write').click()")
    chromium.until("document.getElementById('error').textContent.includes('U+20AC')")
    chromium.complaints.clear()  # the browser logs the status


def test_it_fits_a_phone_and_follows_the_keyboard(page):
    chromium, _ = fresh(page)
    try:
        chromium.resize(360, 740)
        assert chromium.run("document.documentElement.scrollWidth <= 360")
        reached = []
        for _ in range(12):
            chromium.key("Tab")
            reached.append(chromium.run("document.activeElement.id"))
        controls = ["choose", "folder", "text", "read", "prompt", "count", "temperature", "seed", "write"]
        assert [name for name in reached if name in controls][: len(controls)] == controls
        chromium.scheme("dark")
        dark = chromium.run("getComputedStyle(document.body).backgroundColor")
        chromium.scheme("light")
        assert dark != chromium.run("getComputedStyle(document.body).backgroundColor")
    finally:
        chromium.resize(1280, 900)
