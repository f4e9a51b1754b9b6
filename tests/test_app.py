"""The page in a real browser, and what it refuses."""
import json, os, shutil, socket, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app_describer import AppDescriber
from descgen.chapter import HOSTILE_TEXTS

gradio = pytest.importorskip("gradio")
import httpx, uvicorn
from descgen.app import Limits, Writer, create_app

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync"]

class Site:
    "A running page"
    def __init__(self, describer, root, limits=Limits()):
        self.describer, self.writer = describer, Writer(poll=0.05)
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        app = create_app(self.writer, root=root, n_sources=describer.n_sources, examples=("Red mug",), limits=limits)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()

    def load(self):
        self.writer.load(lambda: self.describer)
        return self

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)

@pytest.fixture
def open_site(tmp_path):
    "A function that starts a page"
    sites = []
    def start(describer=None, limits=Limits(per_minute=10_000)):
        sites.append(Site(describer or AppDescriber(), tmp_path, limits))
        return sites[-1]
    yield start
    for site in sites: site.close()

@pytest.fixture(scope="module")
def browser():
    "Chromium"
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium was found: install one, or set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)

def open_page(browser, site, path="/en/", **options):
    "A tab of the browser; it fails on a script's error and on a request to another host"
    page = browser.new_context(**options).new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("dialog", lambda dialog: page.problems.append(dialog.message))
    page.on("request", lambda request: page.problems.append(request.url)
        if not request.url.startswith((site.url, "data:", "blob:")) else None)
    page.goto(site.url + path)
    page.wait_for_selector("#dg-input textarea, #dg-input input")
    return page

def wait_for_text(page, selector, words):
    "Wait until the first element of a selector shows words"
    contains = "([selector, words]) => document.querySelector(selector)?.innerText.includes(words)"
    page.wait_for_function(contains, arg=[selector, words], timeout=20_000)

def status_of(page, words):
    "Wait until the page shows a state"
    wait_for_text(page, ".dg-status", words)

@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_title_is_described_by_keyboard_alone(browser, open_site, width):
    site = open_site().load()
    page = open_page(browser, site, viewport={"width": width, "height": 900})
    status_of(page, "Ready")
    page.focus("#dg-input textarea, #dg-input input")
    page.keyboard.type("Red mug 350 ml")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent").strip() == "Write"
    page.keyboard.press("Enter")
    status_of(page, "Done")
    tuned, base = page.locator(".dg-text").all_inner_texts()
    assert "rolled rim" in tuned and base.startswith("Introducing")
    assert page.locator("mark.dg-title").count() and page.locator("mark.dg-source").count()
    assert page.locator(".dg-card").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.problems == []

@pytest.mark.browser
def test_text_of_data_is_shown_as_text(browser, open_site):
    odd = [*HOSTILE_TEXTS, "${alert(1)}", "{{constructor}}", "`${document.title='x'}`"]
    sources = [{"uid": f"u{n}", "title": text, "content": text} for n, text in enumerate(odd)]
    describer = AppDescriber(sources=sources)
    describer.n_sources = len(sources)
    page = open_page(browser, open_site(describer).load())
    for title in ("<img src=x onerror=alert(1)>", "${alert(1)} {{x}}"):
        page.locator("#dg-input textarea, #dg-input input").fill(title)
        page.keyboard.press("Enter")
        wait_for_text(page, ".dg-text", title) # the state is of this title from here on
        status_of(page, "Done")
    assert page.locator(".dg-text img, .dg-card img, .dg-card script, .dg-card b").count() == 0
    assert page.problems == [] and page.title() == "descgen"

@pytest.mark.browser
def test_states_in_portuguese(browser, open_site):
    site = open_site()
    page = open_page(browser, site, "/", locale="pt-BR")
    assert page.url.endswith("/pt/") and page.evaluate("document.documentElement.lang") == "pt-BR"
    status_of(page, "carregando")
    site.load()
    status_of(page, "Pronto")
    page.get_by_role("button", name="Escrever", exact=True).click()
    status_of(page, "Digite um título")

@pytest.mark.browser
def test_a_visitor_who_leaves_frees_the_model(browser, open_site):
    site = open_site(AppDescriber(seconds=0.2)).load()
    page = open_page(browser, site)
    page.locator("#dg-input textarea, #dg-input input").fill("Mug")
    page.keyboard.press("Enter")
    status_of(page, "writing")
    assert site.writer.free.locked()
    page.close()
    end = time.monotonic() + 5
    while site.writer.free.locked() and time.monotonic() < end:
        time.sleep(0.05)
    assert not site.writer.free.locked() and site.describer.n_words < 15

@pytest.mark.browser
def test_a_file_of_titles(browser, open_site, tmp_path):
    page = open_page(browser, open_site().load())
    page.get_by_role("tab", name="Many titles").click()
    (tmp_path/"titles.txt").write_text("\n".join(f"Mug {i}" for i in range(20)))
    page.set_input_files("input[type=file]", tmp_path/"titles.txt")
    page.get_by_text("titles.txt").first.wait_for(timeout=10_000)
    page.get_by_role("button", name="Write all").click()
    page.get_by_text("20 of 20 titles").wait_for(timeout=20_000)
    with page.expect_download() as download:
        page.get_by_text("Download results").click()
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [row["title"] for row in rows] == [f"Mug {i}" for i in range(20)]

def test_500_requests_at_once_are_refused_and_nothing_hangs(open_site):
    site = open_site(AppDescriber(seconds=0.05), Limits(waiting=5, per_minute=10_000)).load()
    # with httpx's own limit of 20 idle connections, its pool may close one that another thread has just been given
    # (https://github.com/encode/httpcore/issues/1110)
    limits = httpx.Limits(max_connections=100)
    with httpx.Client(base_url=site.url, timeout=60, limits=limits) as client:
        config = client.get("/en/config").json()
        describe = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) == 9)
        def ask(n):
            data = {"data": ["Mug", False, 0.7, 0.9, 8, 42, True, False, 2], "fn_index": describe, "session_hash": f"s{n}"}
            return client.post("/en/gradio_api/queue/join", json=data, headers={"origin": site.url}).status_code
        with ThreadPoolExecutor(50) as pool:
            codes = list(pool.map(ask, range(500)))
        assert set(codes) == {200, 503} and codes.count(503) > 300
        assert client.get("/en/").status_code == 200

def test_too_many_requests_of_one_address_are_refused(open_site):
    site = open_site(limits=Limits(per_minute=3))
    with httpx.Client(base_url=site.url, headers={"origin": site.url}) as client:
        codes = [client.post("/en/gradio_api/queue/join", json={}).status_code for _ in range(5)]
    assert codes[-2:] == [429, 429] and 429 not in codes[:3]

@pytest.mark.parametrize("headers, code", [
    ({"origin": "https://shop.example"}, 403), ({"origin": "null"}, 403),
    ({"host": "shop.example"}, 421), ({"content-length": "9000000"}, 413)])
def test_requests_of_other_pages_and_large_ones_are_refused(open_site, headers, code):
    response = httpx.post(f"{open_site().url}/en/gradio_api/upload", headers=headers, content=b"" if code != 413 else b"a"*9_000_000)
    assert response.status_code == code and response.json()["detail"]
