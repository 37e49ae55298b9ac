"""The server's page in a real browser: every control, on a desktop and on a phone."""

import base64
import contextlib
import io
import json
import re
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from minivla import TINY_VQ, set_random_vq
from openvla import PLATFORMS, Policy, VisualTrace, load_policy
from openvla.inference.demo_policies import DEMO_NAME
from openvla.inference.predict import SAMPLE_IMAGE
from openvla.inference.visual_trace import evaluation_frame
from openvla.tiny import build_tiny
from PIL import Image, ImageOps
from predictions import prefer_end_token
from tracevla import moving_points

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
INSTALL = "make test-browser, or: apt-get install -y chromium && pip install playwright 'openvla[serve]'"
if CHROMIUM is None:
    pytest.skip(f"no chromium on this machine; {INSTALL}", allow_module_level=True)
browsers = pytest.importorskip("playwright.sync_api", reason=INSTALL)
pytest.importorskip("openvla.serving.app", reason=INSTALL, exc_type=ImportError)

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
TOKEN = "a-token-for-the-test"
INSTRUCTION = "pick up the alphabet soup and place it in the basket"
STATISTICS = {
    "action": {"q01": [-0.03] * 3 + [-0.1] * 4, "q99": [0.04] * 3 + [0.1] * 4, "mask": [True] * 6 + [False]},
    "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
}
OFT = {**PLATFORMS["libero"], "parallel_decoding": True, "num_images_in_input": 2}


@contextlib.contextmanager
def serving(token=None, policy=None, **overrides):
    """Serve a policy, by default of a tiny model, on a free port; yield its URL, the policy and the server."""
    from openvla.serving.app import build_app
    from openvla.serving.cli import Limits
    from openvla.serving.middleware import create_server
    from openvla.serving.policy import BatchedPolicy

    if policy is None:
        model, processor = build_tiny(**overrides)
        key = model.resolve_unnorm_key(overrides.get("default_unnorm_key"))
        policy = Policy(model, processor, key, constrain_actions=model.config.action_head is None)
    batched = BatchedPolicy(policy, DEMO_NAME, Limits(image_side=2000))
    app = build_app(batched, token=token)
    running = create_server(app, app.state.policy_app.queue, batched.limits, "127.0.0.1", 0)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/"
        yield SimpleNamespace(url=url, policy=policy, server=running, sessions=batched.sessions)
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    # A camera that shows a test picture, without a permission prompt.
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with browsers.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        yield started
        started.close()


@pytest.fixture(scope="module")
def plain():
    with serving(policy=load_policy()) as server:
        yield server


@pytest.fixture(scope="module")
def untrained():
    """Serve a model with constrained tokens, which predicts an action for any picture."""
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def chunks():
    keys = dict.fromkeys(["bridge_orig", "libero_object_no_noops"], STATISTICS)
    with serving(norm_stats=keys, default_unnorm_key="bridge_orig", action_head="l1", **OFT) as server:
        yield server


@pytest.fixture
def opened(browser):
    """Return a function that opens a page; check that pages log nothing and send no request to another server."""
    contexts, messages, requested = [], [], []

    def open_page(server, viewport=DESKTOP, **settings):
        contexts.append(browser.new_context(viewport=viewport, **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.messages = messages
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        assert page.goto(server.url).status == 200
        page.origin = server.url
        page.locator("#inputs:visible, #token-field:visible").wait_for()  # /info has arrived, or needs a token
        return page

    yield open_page
    # The browser logs every reply with an error status.
    assert [text for text in messages if not text.startswith("Failed to load resource")] == []
    origins = tuple(context.pages[0].origin for context in contexts)
    assert all(url.startswith((*origins, "data:", "blob:")) for url in requested)
    for context in contexts:
        context.close()


def act(page, how=None):
    """Request an action; return the body that was sent and the response."""
    with page.expect_response(re.compile("/act$")) as waiting:
        how() if how else page.get_by_role("button", name="Act", exact=True).click()
    page.wait_for_selector("#prediction[aria-busy=false]")
    return json.loads(waiting.value.request.post_data), waiting.value


def fill(page, cameras=1):
    for index in range(cameras):
        page.set_input_files(f"#camera-{index}", SAMPLE_IMAGE)
        page.get_by_text("256 x 256 pixels").nth(index).wait_for()
    page.get_by_label("Instruction", exact=True).fill(INSTRUCTION)


def dimensions(page):
    """Return name, value and unit of every dimension that the page shows."""
    parts = [page.locator(f"#dims .{part}").all_inner_texts() for part in ("name", "value", "unit")]
    return [(name, float(value), unit) for name, value, unit in zip(*parts)]


def png(size, colour=(200, 30, 30), **settings):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, settings.pop("format", "PNG"), **settings)
    return data.getvalue()


def sent_image(body, name="image"):
    return base64.b64decode(body[name].partition(",")[2])


def test_action_for_image_and_instruction(plain, opened):
    page = opened(plain)
    assert page.title() == DEMO_NAME
    fill(page)
    body, reply = act(page)
    assert sent_image(body) == SAMPLE_IMAGE.read_bytes()  # the file is sent unchanged
    inputs = plain.policy.processor(instruction=INSTRUCTION, images=Image.open(SAMPLE_IMAGE))
    expected = plain.policy.model.predict_action(**inputs, return_dict=True)
    assert reply.json()["actions"] == expected.actions.tolist()
    shown = dimensions(page)
    assert [(name, unit) for name, _, unit in shown] == list(zip(expected.names, expected.units))
    np.testing.assert_allclose([value for _, value, _ in shown], expected.actions, atol=6e-4)
    chosen = expected.bin_probabilities.argmax(-1)
    for index, name in enumerate(expected.names):
        label = page.locator("#dims .bins").nth(index).get_attribute("aria-label")
        assert label.startswith(f"{name}: bin {chosen[index] + 1} of 255 chosen")
        assert f"entropy {expected.entropy[index]:.2f} nats" in page.locator("#dims .scale").nth(index).inner_text()
        line = page.locator("#dims .chosen").nth(index)
        assert float(line.get_attribute("x1")) == chosen[index] + 0.5
    assert page.locator("#gripper").inner_text().startswith("open" if expected.actions[-1] > 0.5 else "closed")
    assert re.fullmatch(r"\d+ ms model \d+ ms", page.locator("#latency").inner_text())


def test_action_depends_on_the_image(plain, opened):
    page = opened(plain)
    fill(page)
    act(page)
    before = dimensions(page)
    page.set_input_files("#camera-0", {"name": "red.png", "mimeType": "image/png", "buffer": png((64, 48))})
    page.get_by_text("64 x 48 pixels").wait_for()
    act(page)
    assert dimensions(page) != before


def test_page_works_by_keyboard(plain, opened):
    page = opened(plain)
    page.set_input_files("#camera-0", SAMPLE_IMAGE)  # opened by the operating system's dialog
    page.get_by_text("256 x 256 pixels").wait_for()
    focused = []
    for _ in range(8):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        if focused[-1] == "instruction":
            page.keyboard.type("open the drawer")
        if focused[-1] == "act":
            break
    assert focused == ["camera-0", "Use camera", "instruction", "key", "constrain", "act"]
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    for keys in ("Enter", "Control+Enter"):
        body, _ = act(page, lambda keys=keys: page.keyboard.press(keys))
        assert body["instruction"] == "open the drawer"
    page.get_by_label("Instruction", exact=True).focus()
    act(page, lambda: page.keyboard.press("Enter"))
    assert page.get_by_label("Instruction", exact=True).input_value() == "open the drawer"


def test_file_can_be_dropped(plain, opened):
    page = opened(plain)
    data = list(png((40, 30)))
    page.evaluate(
        """data => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], "dropped.png", {type: "image/png"}));
            for (const type of ["dragover", "drop"])
                document.querySelector(".drop p").dispatchEvent(
                    new DragEvent(type, {dataTransfer: transfer, bubbles: true, cancelable: true}));
        }""",
        data,
    )
    page.get_by_text("40 x 30 pixels").wait_for()
    page.get_by_label("Instruction", exact=True).fill("go")
    body, _ = act(page)
    assert sent_image(body) == bytes(data)


def test_unsupported_and_large_images_are_converted(plain, opened):
    """Check a format that the server does not accept, and an image that is too large."""
    page = opened(plain)
    page.get_by_label("Instruction", exact=True).fill("go")
    files = {
        "plain.webp": ("image/webp", png((30, 20), format="WEBP", lossless=True), "30 x 20 pixels, sent as PNG"),
        "large.png": ("image/png", png((3000, 300)), "2000 x 200 pixels, made smaller from 3000 x 300"),
    }
    seen = {}
    for name, (kind, content, note) in files.items():
        page.set_input_files("#camera-0", {"name": name, "mimeType": kind, "buffer": content})
        page.get_by_text(note).wait_for()
        body, reply = act(page)
        assert reply.status == 200
        seen[name] = Image.open(io.BytesIO(sent_image(body)))
    assert seen["plain.webp"].getpixel((5, 5))[:3] == (200, 30, 30)
    page.set_input_files("#camera-0", {"name": "no.png", "mimeType": "image/png", "buffer": b"not an image"})
    page.get_by_text("no.png is no image that the browser can read.").wait_for()
    assert page.locator("#camera-0").get_attribute("aria-invalid") == "true"


def test_exif_orientation_is_applied_by_page_and_server(plain, opened):
    """The file is sent unchanged."""
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.open(SAMPLE_IMAGE).convert("RGB").transpose(Image.Transpose.ROTATE_90).crop((0, 0, 256, 200)).save(
        data, "PNG", exif=exif
    )
    page = opened(plain)
    page.get_by_label("Instruction", exact=True).fill(INSTRUCTION)
    page.set_input_files("#camera-0", {"name": "photo.png", "mimeType": "image/png", "buffer": data.getvalue()})
    page.get_by_text("200 x 256 pixels").wait_for()
    body, reply = act(page)
    assert sent_image(body) == data.getvalue()
    upright = ImageOps.exif_transpose(Image.open(data))
    inputs = plain.policy.processor(instruction=INSTRUCTION, images=upright)
    expected = plain.policy.model.predict_action(**inputs, constrain_actions=True)
    assert reply.json()["actions"] == expected.tolist()


def test_recent_instructions_are_listed(plain, opened):
    page = opened(plain)
    fill(page)
    soup, milk = (f"pick up the {thing} and place it in the basket" for thing in ("alphabet soup", "milk"))
    for text in (milk, soup, milk):
        page.get_by_label("Instruction", exact=True).fill(text)
        act(page)
    page.reload()
    page.get_by_role("list", name="Recent instructions").wait_for()
    assert page.locator("#recent button").all_inner_texts() == [milk, soup]
    page.get_by_role("button", name=soup).click()
    assert page.get_by_label("Instruction", exact=True).input_value() == soup


def test_page_fits_a_phone(plain, opened):
    page = opened(plain, PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    fill(page)
    act(page, lambda: page.get_by_role("button", name="Act", exact=True).tap())
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]  # no horizontal scrolling
    page.wait_for_function("Math.abs(document.getElementById('prediction').getBoundingClientRect().top) < 40")
    for target in page.locator("button:visible, select:visible, textarea:visible, label.button").all():
        assert target.bounding_box()["height"] >= 36


CONTRAST = """() => {
    const parse = (text) => (text.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
    const light = (rgb) => {
        const [r, g, b] = rgb.map((x) => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const colour = parse(getComputedStyle(node).backgroundColor);
            if (colour.length === 3 || colour[3] > 0) return colour.slice(0, 3);
        }
        return [255, 255, 255];
    };
    const poor = [];
    for (const node of document.querySelectorAll("body *")) {
        const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        if (!text || !node.checkVisibility() || ["SCRIPT", "TITLE", "title"].includes(node.tagName)) continue;
        const style = getComputedStyle(node), ink = node instanceof SVGElement ? style.fill : style.color;
        const [one, other] = [light(parse(ink).slice(0, 3)), light(behind(node))];
        const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        if (ratio < 4.5) poor.push(`${node.tagName} ${node.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
    }
    return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names_of_controls(plain, opened, scheme):
    """Check WCAG AA: a contrast of 4.5 to 1 between text and background, and a name for every control."""
    page = opened(plain, color_scheme=scheme)
    fill(page)
    act(page)
    page.set_input_files("#camera-0", {"name": "no.png", "mimeType": "image/png", "buffer": b"no"})
    page.get_by_text("is no image").wait_for()
    assert page.evaluate(CONTRAST) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    tree = page.locator("body").aria_snapshot()
    assert not re.search(r"- (button|textbox|combobox|slider|checkbox|img|region)\s*(:|$)", tree, re.MULTILINE)


def test_steps_of_a_chunk(chunks, opened):
    page = opened(chunks)
    fill(page, cameras=2)
    page.get_by_label("State of the robot").fill("[0.1, 0, 0.4, 1, 0, 0, 0.04, -0.04]")
    page.get_by_label("Dataset").select_option("libero_object_no_noops")
    body, reply = act(page)
    assert {"full_image", "wrist_image"} < set(body)
    assert body["state"] == [0.1, 0, 0.4, 1, 0, 0, 0.04, -0.04]
    actions = np.array(reply.json()["actions"])
    assert actions.shape == (8, 7)
    assert page.locator("#dims .bins").count() == 0  # a continuous head has no bins
    slider = page.get_by_role("slider", name="Step 1 of 8")
    for step in (0, 1, 7):
        page.locator("#step").fill(str(step + 1))
        np.testing.assert_allclose([value for _, value, _ in dimensions(page)], actions[step], atol=6e-3)
        assert page.locator("#gripper").inner_text().startswith("open" if actions[step, -1] > 0.5 else "closed")
    assert slider.count() == 0
    assert dimensions(page)[0][2] == "controller units"
    # The path from above, step by step: y to the left, x upwards, one scale for all axes.
    path = np.concatenate([np.zeros((1, 3)), actions[:, :3].cumsum(0)])
    points = page.locator("#views polyline").first.get_attribute("points").split()
    drawn = np.array([[float(x) for x in point.split(",")] for point in points])
    scale = 74 / np.abs(path).max()
    np.testing.assert_allclose(drawn, [120, 100] + np.stack([-path[:, 1], -path[:, 0]], 1) * scale, atol=1e-6)
    closed = page.locator("#views svg").first.locator("circle.closed").count()
    assert closed == (actions[:, -1] <= 0.5).sum()
    page.get_by_text("All numbers").click()
    cells = page.locator("#numbers td").all_inner_texts()
    np.testing.assert_allclose(np.array(cells, float).reshape(8, 7), actions, atol=5e-7)


def test_bins_of_every_step_of_a_chunk_of_tokens(opened):
    with serving(norm_stats={"bridge_orig": STATISTICS}, **OFT) as server:
        page = opened(server)
        fill(page, cameras=2)
        page.get_by_label("State of the robot").fill("0 0 0 0 0 0 0 0")
        _, reply = act(page)
        probabilities = np.array(reply.json()["bin_probabilities"])
        assert probabilities.shape == (8, 7, 255)
        page.locator("#step").fill("4")
        labels = page.locator("#dims .bins").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
        assert [int(re.search(r"bin (\d+)", label)[1]) for label in labels] == list(probabilities[3].argmax(-1) + 1)


def test_missing_input_is_named_beside_its_field(chunks, opened):
    page = opened(chunks)
    button = page.get_by_role("button", name="Act", exact=True)
    button.click()
    page.locator("#camera-0-error", has_text="Choose an image first.").wait_for()
    page.set_input_files("#camera-0", SAMPLE_IMAGE)
    page.get_by_text("256 x 256 pixels").wait_for()
    button.click()
    page.locator("#camera-1-error", has_text="Choose an image first.").wait_for()
    page.set_input_files("#camera-1", SAMPLE_IMAGE)
    page.get_by_text("256 x 256 pixels").nth(1).wait_for()
    button.click()
    page.locator("#instruction-error", has_text="Say what the robot should do.").wait_for()
    page.get_by_label("Instruction", exact=True).fill("go")
    for text, words in (("1 2 3", "8 numbers are needed, these are 3."), ("1 2 3 x 5 6 7 8", "x is no number.")):
        page.get_by_label("State of the robot").fill(text)
        button.click()
        page.locator("#state-error", has_text=words).wait_for()
    assert page.locator(".error:not(:empty)").count() == 1


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        ("$('instruction').value = 'x'.repeat(1001)", "#instruction-error", "1001 characters"),
        ("$('key').options[0].value = 'kitchen'", "#key-error", "Unknown unnorm_key 'kitchen'"),
        ("model.slots[0].data = 'data:image/png;base64,AAAA'", "#camera-0-error", "image must be base64 of a PNG"),
        (
            "model.info.proprio_dim = 1; document.getElementById('state').value = '1'",
            "#state-error",
            "without the robot",
        ),
    ],
)
def test_rejected_field_is_marked(plain, opened, change, place, words):
    page = opened(plain)
    fill(page)
    page.evaluate(change + "; undefined")
    if place == "#state-error":
        page.evaluate("$('state-field').hidden = false")
    _, reply = act(page)
    assert reply.status == 422
    page.locator(place, has_text=words).wait_for()
    assert page.locator(".error:not(:empty)").count() == 1
    assert page.locator("[aria-invalid=true]").count() == 1


def test_stopped_server_is_reported(opened):
    with serving() as server:
        page = opened(server)
        fill(page)
        act(page)
    page.get_by_role("button", name="Act", exact=True).click()
    page.locator("#error", has_text="The server cannot be reached").wait_for()


def test_no_action_is_reported(opened):
    model, processor = build_tiny()
    prefer_end_token(model, processor(instruction=INSTRUCTION, images=Image.open(SAMPLE_IMAGE)))
    with serving(policy=Policy(model, processor, model.resolve_unnorm_key())) as server:
        page = opened(server)
        fill(page)
        body, reply = act(page)  # constrained, which the page shows
        assert (body["constrain_actions"], reply.status) == (True, 200)
        assert len(dimensions(page)) == 7
        assert page.locator("#chosen").inner_text() == "action tokens only"
        page.get_by_label("Actions only").uncheck()
        body, reply = act(page)
        assert (body["constrain_actions"], reply.status) == (False, 422)
        page.locator("#error", has_text="No action. The model ended the sequence after 1 of 7 action tokens").wait_for()
        assert not page.locator("#result").is_visible()  # it would be the action of another request
        page.get_by_label("Actions only").check()
        assert act(page)[1].status == 200
        assert page.locator("#result").is_visible()
        assert page.locator(".error:not(:empty)").count() == 0


def test_token_is_requested_and_stored(opened):
    with serving(token=TOKEN) as server:
        page = opened(server)
        field = page.get_by_label("Token of this server")
        field.wait_for()
        assert not page.locator("#act").is_visible()
        for token in ("a-wrong-one-of-some-length", TOKEN):
            field.fill(token)
            field.press("Enter")
            if token != TOKEN:
                page.get_by_text("This token is not accepted.").wait_for()
        page.locator("#act").wait_for()
        assert not field.is_visible()
        page.reload()
        fill(page)
        assert act(page)[1].status == 200


def test_live_mode_with_a_camera(untrained, opened):
    page = opened(untrained, permissions=["camera"])
    page.get_by_label("Instruction", exact=True).fill("go")
    assert not page.get_by_role("checkbox", name="Live").is_visible()
    page.get_by_role("button", name="Image: use the camera").click()
    page.get_by_text("pixels, live").wait_for()
    frames = []
    page.on("request", lambda request: request.url.endswith("/act") and frames.append(json.loads(request.post_data)))
    page.get_by_role("checkbox", name="Live").check()
    deadline = time.monotonic() + 60
    while len(frames) < 4 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    page.get_by_role("checkbox", name="Live").uncheck()
    assert len({frame["image"] for frame in frames}) > 1  # the picture moves
    page.wait_for_selector("#prediction[aria-busy=false]")
    requested = len(frames)
    page.wait_for_timeout(1000)
    assert len(frames) == requested
    page.get_by_role("button", name="Image: use the camera").click()
    assert not page.get_by_role("checkbox", name="Live").is_visible()


def upload(page, index, size, colour):
    """Choose a picture of one colour; return the colour that is sent for it."""
    page.set_input_files(
        f"#camera-{index}", {"name": "frame.png", "mimeType": "image/png", "buffer": png(size, colour)}
    )
    page.locator(f"#camera-{index}-note", has_text=f"{size[0]} x {size[1]} pixels").wait_for()
    return colour


def colours(images):
    """Return the colours of sent pictures of one colour."""
    pictures = [Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))) for image in images]
    return [picture.convert("RGB").getpixel((0, 0)) for picture in pictures]


def test_history_and_wrist_images_are_uploaded_or_kept_by_the_server(opened):
    model, processor = build_tiny(**{**TINY_VQ, "image_sequence_len": 4, "use_wrist_image": True})
    policy = Policy(set_random_vq(model), processor, "made up", constrain_actions=True)
    with serving(policy=policy) as server:
        page = opened(server)
        legends = page.locator("legend").all_inner_texts()
        cameras = ["Main camera", "Wrist camera"]
        assert legends == [f"{camera}, {when}" for when in ("1 step before", "now") for camera in cameras]
        page.get_by_label("Instruction", exact=True).fill(INSTRUCTION)
        sent = [upload(page, index, (40, 40 + index), (60 * index, 200 - 60 * index, 9)) for index in range(3)]
        page.get_by_role("button", name="Act", exact=True).click()
        assert page.locator("#camera-3-error").inner_text() == "Choose an image first."
        sent.append(upload(page, 3, (40, 40), (1, 2, 3)))
        body, response = act(page)
        assert colours(body["image"]) == sent
        assert "session" not in body
        images = [Image.new("RGB", (40, 40 + index % 3), colour) for index, colour in enumerate(sent)]
        expected = policy.act(images, INSTRUCTION)
        assert response.json()["actions"] == expected.tolist()
        assert page.locator("#codes .value").all_inner_texts() == [
            f"code {code}" for code in model.action_tokenizer.codes(response.json()["token_ids"])
        ]
        assert page.locator("#dims .bins").count() == 0
        assert page.locator("#codes .bins").count() == 5
        page.get_by_label("Episode: give the images of each step").check()
        assert page.locator("legend").all_inner_texts() == cameras
        policy.reset()
        for step in range(3):
            assert page.get_by_text(f"The next image is step {step + 1} of the episode.").is_visible()
            for index in range(2):
                upload(page, index, (40, 40 + step), (90 * step, 99 * index, 20))
            body, response = act(page)
            assert body["step"] == step
            moment = [Image.new("RGB", (40, 40 + step), (90 * step, 99 * index, 20)) for index in range(2)]
            assert response.json()["actions"] == policy.act(moment, INSTRUCTION).tolist()
        page.get_by_role("button", name="New episode").click()
        assert act(page)[0]["step"] == 0


@pytest.mark.parametrize("draws_traces", [True, False])
def test_the_trace_that_the_model_was_given_is_shown(draws_traces, opened):
    model, processor = build_tiny(trace_prompting=True)
    policy = Policy(model, processor, "untrained", True, VisualTrace(moving_points, seed=0) if draws_traces else None)
    with serving(policy=policy) as server:
        page = opened(server)
        page.get_by_label("Instruction", exact=True).fill(INSTRUCTION)
        upload(page, 0, (60, 50), (90, 120, 30))
        if not draws_traces:
            assert page.locator("legend").all_inner_texts() == ["Frame", "Frame with its trace (optional)"]
            act(page)
            assert page.get_by_text("This frame has no trace; the model saw it twice.").is_visible()
            upload(page, 1, (60, 50), (4, 5, 6))
            assert colours(act(page)[0]["image"]) == [(90, 120, 30), (4, 5, 6)]
            assert shown_pixels(page)[0, 0].tolist() == [4, 5, 6]
            return
        assert page.locator("legend").all_inner_texts() == ["Frame"]
        expected = VisualTrace(moving_points, seed=0)
        for step in range(11):
            act(page)
            traced = expected.update(evaluation_frame(Image.new("RGB", (60, 50), (90, 120, 30))))
            assert page.locator("#traced").is_visible() == (traced is not None) == (step >= 9)
            assert page.locator("#untraced").is_visible() == (traced is None)
        assert np.array_equal(shown_pixels(page), np.array(traced))


def shown_pixels(page):
    """Return the pixels of the image with the trace, as the browser shows it: uint8 (height, width, 3)."""
    page.wait_for_function("document.querySelector('#traced').complete")
    size, data = page.evaluate(
        """() => {
          const image = document.querySelector("#traced"), canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          return [[canvas.height, canvas.width], [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
        }"""
    )
    return np.array(data, np.uint8).reshape(*size, 4)[..., :3]


def test_a_forgotten_session_begins_anew(opened):
    model, processor = build_tiny(trace_prompting=True)
    with serving(policy=Policy(model, processor, "untrained", True, VisualTrace(moving_points))) as server:
        page = opened(server)
        page.get_by_label("Instruction", exact=True).fill(INSTRUCTION)
        upload(page, 0, (60, 50), (90, 120, 30))
        act(page)
        server.sessions._sessions.clear()  # as a restart would
        assert act(page)[1].status == 409
        assert "Begin an episode" in page.locator("#episode-error").inner_text()
        body, response = act(page)
        assert (body["step"], response.status) == (0, 200)
