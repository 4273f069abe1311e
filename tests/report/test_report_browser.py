"""The page in a real browser: never wider than the screen, no chart label or table cut off. Skipped if there is no Chromium or Chrome."""

import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from functools import partial
from html import unescape

import pytest

NAMES = (os.environ.get("SHOTLESS_BROWSER", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if name and (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH; SHOTLESS_BROWSER can name one")
WIDTHS = (375, 1440)
# A page that shows the report in frames of some widths, and replaces itself by what it measured.
MEASURE = """<!doctype html><body>%s<script>
onload = () => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, right = element => element.getBoundingClientRect().right;
    page.querySelectorAll('details').forEach(details => details.open = true);
    const inside = element => element.closest('.scroll, .skip');
    const wider = [...page.querySelectorAll('body *')].filter(e => !inside(e) && right(e) > frame.clientWidth + 1);
    const cut = [...page.querySelectorAll('figure svg text')].filter(text => right(text) > right(text.closest('figure')) + 8);
    const clipped = [...page.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60));
    const width = page.documentElement.scrollWidth;
    return {clipped, width, wider: wider.map(e => e.outerHTML.slice(0, 120)), cut: cut.map(e => e.textContent)};
  });
  document.body.textContent = 'MEASURED' + JSON.stringify(found) + 'END';
};
</script></body>"""


@pytest.mark.parametrize("run", ["root", "many"])
@pytest.mark.slow
def test_nothing_is_wider_than_the_screen_and_no_label_is_cut_off(request, run, tmp_path):
    folder = request.getfixturevalue("root") if run == "root" else request.getfixturevalue("many")[0]
    shutil.copy(folder / "report" / "index.html", tmp_path / "report.html")
    frames = "".join(f'<iframe src="report.html" style="border:0;width:{width}px;height:900px"></iframe>' for width in WIDTHS)
    (tmp_path / "measure.html").write_text(MEASURE % frames, encoding="utf-8")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000"]
        command = [str(BROWSER), *flags, "--dump-dom", f"http://127.0.0.1:{server.server_port}/measure.html"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    finally:
        server.shutdown()
        server.server_close()
    measured = re.search("MEASURED(.*)END", said, re.DOTALL)
    assert measured, said[:500]
    for width, found in zip(WIDTHS, json.loads(unescape(measured.group(1))), strict=True):
        assert found["width"] <= width
        assert found["wider"] == []
        assert found["cut"] == []
        assert width < 1000 or found["clipped"] == []  # on a phone, wide tables scroll
