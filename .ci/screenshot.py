"Take the picture of the page for the README: python .ci/screenshot.py [ADAPTER [TITLE]]; without an adapter, fixed texts are shown"
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
from app_describer import AppDescriber
from playwright.sync_api import sync_playwright
from test_app import ARGUMENTS, CHROMIUM, Site

def load_describer():
    "The describer of the adapter, or the one with fixed texts"
    if len(sys.argv) == 1: return AppDescriber()
    from descgen.describer import Describer
    return Describer(sys.argv[1])

site = Site(load_describer(), ROOT/"outputs/runs")
site.load()
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    page.goto(f"{site.url}/en/")
    page.locator("#dg-input textarea, #dg-input input").fill((sys.argv[2:] or ["Red enamel mug, 350 ml"])[0])
    page.keyboard.press("Enter")
    page.get_by_text("Done.").wait_for(timeout=300_000)
    path = ROOT/"nbs/images/app.png"
    page.screenshot(path=path, full_page=True)
site.close()
assert path.stat().st_size < 150_000, f"{path} has {path.stat().st_size:,} bytes"
print(path.relative_to(ROOT), f"{path.stat().st_size:,} bytes")
