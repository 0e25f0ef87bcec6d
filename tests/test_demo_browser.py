"""The demo in a real browser, headless: every tab used once, and what is refused is said where it is seen."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from test_demo import captioned, clip_run, pictures, served  # noqa: F401  (fixtures)
from test_flamingo_cli import directly, ours  # noqa: F401

from launch import demo

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync", "window-size=1200,1100")  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="no chromium and chromedriver (Debian: chromium-driver)"),
]


class Tab:
    """The page in one browser, seen through the tab that is open."""

    def __init__(self, driver: webdriver.Chrome, address: str):
        gone = [StaleElementReferenceException, IndexError]  # what is drawn anew while it is read
        self.driver, self.wait = driver, WebDriverWait(driver, 60, 0.1, gone)
        driver.get("data:,")
        driver.get_log("performance")  # what came before is not the page's
        driver.get(address)
        self.wait.until(lambda _: self.seen("//button[@role='tab']"))

    def seen(self, path: str) -> list[WebElement]:
        return [e for e in self.driver.find_elements(By.XPATH, path) if e.is_displayed()]

    def open(self, name: str) -> None:
        self.seen(f"//button[@role='tab'][normalize-space()='{name}']")[0].click()

    def click(self, name: str, which: int = 0) -> None:
        def clicked(_: object) -> bool:
            self.seen(f"//button[normalize-space()='{name}']")[which].click()
            return True

        self.wait.until(clicked)

    def field(self, label: str) -> WebElement:
        path = f"//label[.//span[normalize-space()='{label}']]//*[self::textarea or self::input]"
        return self.wait.until(lambda _: self.seen(path))[0]

    def write(self, label: str, text: str) -> None:
        self.field(label).clear()
        self.field(label).send_keys(text)

    def send(self, *paths: Path) -> None:
        """Files to the open tab's place for them."""
        script = "return arguments[0].closest('[role=tabpanel]').offsetParent !== null"

        def places(_: object) -> list[WebElement]:
            every = self.driver.find_elements(By.CSS_SELECTOR, "input[type=file]")
            return [e for e in every if self.driver.execute_script(script, e)]

        self.wait.until(places)[0].send_keys("\n".join(map(str, paths)))

    def remove(self) -> None:
        """Takes the picture away again."""
        self.seen("//*[@role='tabpanel']//button[@aria-label='Remove Image']")[0].click()
        self.reads("Drop Image Here")
        self.wait.until(lambda _: not self.seen("//*[contains(@class, 'line')]//p"))

    @contextlib.contextmanager
    def told(self, text: str) -> Iterator[None]:
        """Waits until the text has stood on the page after what is done here, were it but for a moment."""
        self.driver.execute_script(
            "window.told = ''; const note = node => { window.told += node.innerText || node.textContent };"
            "new MutationObserver(changes => changes.forEach(change => { note(change.target) }))"
            ".observe(document.body, {childList: true, characterData: true, subtree: true})"
        )
        yield
        self.wait.until(lambda _: self.driver.execute_script("return window.told.includes(arguments[0])", text))

    def reads(self, text: str) -> None:
        """Waits until the text stands on the open tab."""
        self.wait.until(lambda _: any(text in e.text for e in self.seen("//*[@role='tabpanel']")))

    def holds(self, label: str, text: str) -> None:
        self.wait.until(lambda _: self.field(label).get_attribute("value") == text)

    def pictures(self) -> Sequence[WebElement]:
        return self.wait.until(lambda _: self.seen("//ol[@class='grid']//img"))


@pytest.fixture(scope="module")
def tab(served: demo.Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:  # noqa: F811
    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        yield Tab(driver, served.address)
    finally:
        driver.quit()


def test_labels_and_hostile_uploads(tab: Tab, pictures: Path) -> None:  # noqa: F811
    tab.open("Label")
    tab.write("Labels", "a cat, a dog")
    tab.send(pictures / "bad" / "svg.png")
    tab.reads("svg.png: no picture; PNG, JPEG, WEBP, GIF, BMP or AVIF expected")
    for name, line in (("bomb.png", "bomb.png: far too many pixels; at most 1,000,000 expected"),
                       ("text.png", "text.png: no picture")):  # fmt: skip
        tab.remove()
        tab.send(pictures / "bad" / name)
        tab.reads(line)
    tab.remove()
    with tab.told("exceed the maximum allowed size of"):
        tab.send(pictures / "bad" / "large.png")
    tab.send(pictures / "good" / "red.png")
    tab.wait.until(lambda _: {e.text for e in tab.seen("//dt")} == {"a cat", "a dog"})
    assert not tab.seen("//*[contains(@class, 'line')]//p")


def test_search_and_rerank(tab: Tab, pictures: Path) -> None:  # noqa: F811
    tab.open("Search")
    tab.write("Find pictures by a text", "a dog")
    tab.click("Find")
    assert len(tab.pictures()) == 6
    assert all(str(e.get_attribute("src")).startswith("data:image/webp;base64,") for e in tab.pictures())
    tab.send(pictures / "good" / "blue.png")
    tab.reads("1.000 blue.png")
    tab.open("Rerank")
    tab.send(*(pictures / "good" / f"{colour}.png" for colour in ("red", "lime", "blue")))
    tab.reads("lime")
    tab.click("Order them")
    assert len(tab.pictures()) == 3


def test_flamingo_asks_captions_builds_and_chats(served: demo.Served, tab: Tab, pictures: Path) -> None:  # noqa: F811
    red, lime = pictures / "good" / "red.png", pictures / "good" / "lime.png"
    loaded = served.flamingo.speaker.loaded
    tab.open("Ask")
    tab.send(red)
    tab.write("Question", "what now?")
    tab.click("Answer")
    tab.holds("Flamingo", directly(loaded, [[red]], "Question: what now? Answer:")[0])
    captions = [captioned(served, path) for path in (red, lime)]
    tab.click("Caption")
    tab.holds("Flamingo", captions[0])

    tab.open("Caption many")
    tab.send(red, lime)
    tab.reads("lime")
    tab.click("Begin")
    tab.wait.until(lambda _: [e.text for e in tab.seen("//ol[@class='grid']//p")] == captions)

    tab.open("Few shots")
    tab.send(red)
    tab.write("Question", "what?")
    tab.write("Answer", "red")
    tab.click("Add picture, question and answer")
    tab.holds("What the model reads", "<image>Question: what? Answer: red<EOC>")
    tab.holds("Answer", "")
    tab.send(lime)
    tab.click("Add picture, question and answer")
    whole = "<image>Question: what? Answer: red<EOC><image>Question: what? Answer:"
    tab.holds("What the model reads", whole)
    tab.click("Go on")
    texts = ["Question: what? Answer: red", "Question: what? Answer:"]
    tab.holds("Flamingo", directly(loaded, [[red, lime]], *texts)[0])
    tab.click("↓", 2)  # the answer, after the end
    tab.holds("What the model reads", "<image>Question: what? Answer:<EOC> red<image>Question: what? Answer:")
    tab.click("✕", 2)
    tab.holds("What the model reads", "<image>Question: what? Answer: red<image>Question: what? Answer:")

    tab.open("Chat")
    tab.send(red)
    tab.wait.until(lambda _: tab.seen("//*[@role='tabpanel']//img"))
    box = tab.seen("//textarea[starts-with(@placeholder, 'A question')]")[0]
    box.send_keys("what?\n")
    tab.reads(directly(loaded, [[red]], "Question: what? Answer:")[0])


def test_nothing_was_asked_of_another_server(served: demo.Served, tab: Tab) -> None:  # noqa: F811
    """Of all that the page did in the tests above."""
    events = [json.loads(entry["message"])["message"] for entry in tab.driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    hosts = {urlsplit(url).netloc for url in urls if not url.startswith(("data:", "blob:", "chrome:"))}
    assert hosts == {urlsplit(served.address).netloc}
