"""Takes docs/chat.png, the chat page in a conversation with a speedrun's model.

pip install playwright      # and Debian's package chromium
python -m jaxgpt.serve --checkpoint runs/speedrun/chat
python docs/chat_picture.py
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

QUESTIONS = ("Hi! What is your name?", "What is 47 + 85?", "热的反义词是什么？")
PICTURE = Path(__file__).with_name("chat.png")


def main() -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 720, "height": 920}, locale="en-US")
        page.goto("http://127.0.0.1:8000")
        page.click("#tab-chat")
        for number, question in enumerate(QUESTIONS):
            page.fill("#draft", question)
            page.keyboard.press("Enter")
            page.locator(".assistant").nth(number).wait_for()
            page.locator("#stop").wait_for(state="hidden")
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main()
