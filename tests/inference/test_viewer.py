"""The attention viewer: what its server answers, and what it refuses."""

import base64
import http.client
import io
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import EpsImagePlugin, Image

from ccnet_d2.data.errors import SampleError
from ccnet_d2.engine import apply_overrides
from ccnet_d2.errors import UserError
from ccnet_d2.inference import ClassTable, Predictor, viewer
from ccnet_d2.inference.viewer import Gallery, UploadError, ViewerServer, make_server
from ccnet_d2.model_zoo import get_config


def make_predictor(*overrides):
    torch.manual_seed(0)
    cfg = apply_overrides(get_config("toy/ccnet_synthetic.py"), list(overrides))
    model = instantiate(cfg.model).eval()
    if hasattr(model.sem_seg_head.context, "gamma"):
        model.sem_seg_head.context.gamma.data.fill_(0.5)
    return Predictor(model, classes=["a", "b", "c", "d"])


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo <b>.png"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def gallery(photo):
    models = [("R=2", make_predictor()), ("none", make_predictor("model.sem_seg_head.context=none"))]
    return Gallery(models, [photo], longest_side=64)


@pytest.fixture(scope="module")
def server(gallery):
    with make_server(gallery) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(server):
    def call(path, body=None, **headers):
        request = urllib.request.Request(server.url + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    return call


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def opened(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_the_page_and_its_parts_are_served_from_here_alone(ask, server):
    assert server.server_address[0] == "127.0.0.1"
    for path, kind, text in (
        ("", "text/html", b'<script src="viewer.js"'),
        ("viewer.js", "text/javascript", b"fetch("),
        ("viewer.css", "text/css", b".frame"),
    ):
        status, headers, body = ask(path)
        assert status == 200 and headers["Content-Type"].startswith(kind) and text in body
        policy = set(headers["Content-Security-Policy"].split("; "))
        # Maps are shown as data: addresses.
        assert {
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data:",
        } <= policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert b"http://" not in body and b"https://" not in body  # nothing is loaded from elsewhere


def test_the_gallery_lists_models_and_images(ask):
    status, _, body = ask("api/gallery")
    listed = json.loads(body)
    assert status == 200
    assert listed["models"] == [{"name": "R=2", "recurrence": 2}, {"name": "none", "recurrence": 0}]
    assert listed["images"][0] == {"id": 0, "name": "photo <b>.png", "width": 36, "height": 24}


def test_maps_are_those_of_the_predictor(ask, gallery, photo):
    predictor = gallery.models[0][1]
    for loops in (1, 3, 2, 8):
        status, _, body = ask(f"api/attention?image=0&model=0&x=20&y=11&recurrence={loops}")
        found = json.loads(body)
        assert status == 200
        expected = predictor.attention(photo, 20, 11, recurrence=loops)
        assert found["cell"] == list(expected.cell) == [5, 10]
        assert found["grid"] == [12, 18] and len(found["maps"]) == loops
        for one, shares in zip(found["maps"], expected.maps, strict=True):
            sent = np.frombuffer(base64.b64decode(one["shares"]), "<f4").reshape(12, 18)
            np.testing.assert_array_equal(sent, shares)
            assert sent.sum() == pytest.approx(1, abs=1e-5)
            assert one["largest"] == pytest.approx(shares.max())
            assert opened(base64.b64decode(one["picture"])).shape == (24, 36, 3)
        off_cross = np.delete(
            np.delete(
                np.frombuffer(base64.b64decode(found["maps"][0]["shares"]), "<f4").reshape(12, 18), 5, axis=0
            ),
            10,
            axis=1,
        )
        assert not off_cross.any()
    status, _, body = ask("api/attention?image=0&model=0&x=20&y=11")
    assert len(json.loads(body)["maps"]) == 2  # the model's own R


def test_pictures(ask, gallery, photo):
    status, headers, body = ask("api/image?image=0")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert np.array_equal(opened(body), opened(photo.read_bytes()))
    for model in (0, 1):  # with attention and without
        status, _, body = ask(f"api/prediction?image=0&model={model}")
        assert status == 200
        assert opened(body).shape[0] % 24 == 0
        labels = gallery.models[model][1](photo, labels_only=True).labels
        _, _, body = ask(f"api/classes?image=0&model={model}")
        found = {one["name"]: one["share"] for one in json.loads(body)}
        assert found == {name: (labels == k).mean() for k, name in enumerate("abcd") if (labels == k).any()}


def test_uploads_are_turned_upright_and_reduced(ask):
    image = Image.fromarray(np.full((40, 200, 3), 77, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    status, _, body = ask("api/image?name=turned.jpg", encoded(image, "JPEG", exif=exif))
    described = json.loads(body)
    assert status == 200
    assert (described["name"], described["width"], described["height"]) == ("turned.jpg", 13, 64)
    _, _, body = ask(f"api/image?image={described['id']}")
    assert opened(body).shape == (64, 13, 3)
    status, _, body = ask(f"api/attention?image={described['id']}&model=0&x=12&y=63")
    assert status == 200 and len(json.loads(body)["maps"]) == 2


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF"])
def test_formats_that_are_taken(gallery, format):
    number = gallery.upload("one", encoded(Image.new("RGB", (20, 10), (200, 30, 90)), format))["id"]
    shown = opened(gallery.picture(number)).astype(int)
    assert shown.shape == (10, 20, 3) and np.abs(shown - (200, 30, 90)).max() <= 4


@pytest.mark.parametrize("format", ["EPS", "ICO", "TGA", "PCX"])
def test_formats_that_are_not(gallery, monkeypatch, format):
    """One of them is read by another program, which runs what is in the file."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a file was run"))
    with pytest.raises(UploadError, match="damaged or no image"):
        gallery.upload("one", encoded(Image.new("RGB", (20, 10)), format))


def test_names_and_very_wide_pictures_are_cut(gallery):
    described = gallery.upload("n" * 500, encoded(Image.new("RGB", (5000, 2))))
    assert described == {"id": described["id"], "name": "n" * 80, "width": 64, "height": 1}
    assert opened(gallery.picture(described["id"])).shape == (1, 64, 3)
    assert opened(gallery.prediction(described["id"], 0)).shape[1] % 64 == 0
    assert len(gallery.attention(described["id"], 0, 63, 0)["maps"]) == 2


def test_classes_are_listed_by_their_share(gallery, monkeypatch):
    labels = np.array([[3, 3, 3, 1], [0, 0, 3, 3]], np.uint8)
    classes = ClassTable.create("abcd")
    found = SimpleNamespace(labels=labels, classes=classes)
    monkeypatch.setattr(gallery, "_prediction", lambda number, model: found)
    shares = [(one["name"], one["share"], one["color"]) for one in gallery.classes(0, 0)]
    wanted = (("d", 5 / 8, 3), ("a", 2 / 8, 0), ("b", 1 / 8, 1))
    assert shares == [(name, share, classes.colors[k].tolist()) for name, share, k in wanted]


def test_models_are_counted_from_0(gallery):
    for model in (-1, 2):
        with pytest.raises(UserError, match=f"there is no model {model}: there are 2"):
            gallery.prediction(0, model)


def test_old_uploads_are_forgotten_and_given_images_are_not(photo):
    gallery = Gallery([("a", make_predictor())], [photo])
    content = encoded(Image.new("RGB", (20, 20)))
    numbers = [gallery.upload("x", content)["id"]]
    gallery.attention(numbers[0], 0, 1, 1)
    numbers += [gallery.upload("x", content)["id"] for _ in range(16)]
    assert [image["id"] for image in gallery.describe()["images"]] == [0, *numbers[-16:]]
    for look in (lambda: gallery.picture(1), lambda: gallery.attention(1, 0, 1, 1)):  # nor what was computed
        with pytest.raises(UserError, match="there is no image 1"):
            look()


def test_the_images_looked_at_last_are_not_computed_again(monkeypatch):
    predictor = make_predictor()
    gallery = Gallery([("a", predictor)])
    computed = []
    look_into = predictor.look_into
    monkeypatch.setattr(
        predictor, "look_into", lambda image: computed.append(image[0, 0, 0]) or look_into(image)
    )
    numbers = [gallery.upload(str(k), encoded(Image.new("RGB", (16, 16), (k, 0, 0))))["id"] for k in range(9)]
    for number in (*numbers[:8], numbers[0], numbers[8], numbers[0]):
        gallery.attention(number, 0, 3, 3)
    assert computed == list(range(9))
    gallery.attention(numbers[1], 0, 3, 3)  # of which eight others have been looked at since
    assert computed == [*range(9), 1]


def test_given_images_are_kept_as_files_and_not_in_memory(photo, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(photo.read_bytes())
    gallery = Gallery([("a", make_predictor())], [path], longest_side=18)
    assert opened(gallery.picture(0)).shape == (12, 18, 3)
    Image.new("RGB", (36, 24), (9, 200, 30)).save(path)
    assert (opened(gallery.picture(0)) == (9, 200, 30)).all()
    Image.new("RGB", (24, 36)).save(path)
    with pytest.raises(UserError, match=r"photo\.png has another size than when the viewer was started"):
        gallery.picture(0)
    path.unlink()
    with pytest.raises(SampleError, match=r"photo\.png' cannot be read"):
        gallery.attention(0, 0, 1, 1)


# The page's script with a document of stubs and a server that answers when it is told to.
PAGE = """
const made = () => ({ value: "", textContent: "", dataset: { model: 0 }, style: { setProperty() {} }, children: [],
  classList: { names: new Set(), add(name) { this.names.add(name); }, remove(name) { this.names.delete(name); },
    toggle(name, on) { this[on ? "add" : "remove"](name); } },
  addEventListener() {}, append() {}, replaceChildren() {}, querySelector: made, querySelectorAll: () => [] });
const elements = {};
const shown = made();
globalThis.document = { body: made(), activeElement: { tagName: "BODY" }, addEventListener() {}, createElement: made,
  getElementById: (id) => (elements[id] ??= made()), querySelectorAll: (which) => (which === ".row" ? [shown] : []) };
let answer;
globalThis.fetch = () => new Promise((resolve) => { answer = resolve; });
const found = { cell: [0, 0], grid: [1, 1], extent: [1, 1], maps: [] };
const reply = { ok: true, json: async () => found };
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script in node")
@pytest.mark.parametrize("chosen", ["0", "1"])
def test_another_image_chosen_while_maps_are_computed(chosen, tmp_path):
    """What comes in then was asked for the image before, in which the pixel was."""
    source = Path(viewer.__file__).with_name("viewer.js").read_text().replace("\nstart();", "")
    program = f"""{source}
    const images = [0, 1].map((id) => ({{ id, width: 9, height: 9 }}));
    state.gallery = {{ models: [{{ name: "m", recurrence: 2 }}], images }};
    element("image").value = "0";
    restart();
    const looking = choose(3, 4);
    element("image").value = "{chosen}";
    if ("{chosen}" !== "0") restart();
    answer(reply);
    looking.then(() => {{
      const status = element("status");
      console.log(JSON.stringify([status.textContent, status.classList.names.has("error"),
        document.body.classList.names.has("busy")]));
    }});
    """
    script = tmp_path / "page.js"
    script.write_text(PAGE + program.replace('"use strict";', ""))
    run = subprocess.run(["node", script], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr
    text = "pixel 3, 4 · cell 0, 0 of 1×1" if chosen == "0" else "Click a pixel."
    assert json.loads(run.stdout) == [text, False, False]


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script in node")
def test_a_file_too_large_to_upload_is_not_sent(ask, tmp_path):
    """The server answers before all of it has arrived, and browsers then know of a broken connection only."""
    limit = json.loads(ask("api/gallery")[2])["most_bytes"]
    assert ask("api/image", b"x", **{"Content-Length": str(limit + 1)})[0] == 413
    source = Path(viewer.__file__).with_name("viewer.js").read_text().replace("\nstart();", "")
    program = f"""{source}
    state.gallery = {{ models: [], images: [], most_bytes: {limit} }};
    let sent = 0;
    globalThis.fetch = async () => {{ sent += 1; return {{ ok: false, json: async () => ({{ error: "it came" }}) }}; }};
    const said = [];
    const told = async (size) => {{
      await upload({{ name: "large.tif", size }});
      const status = element("status");
      said.push([sent, status.textContent, status.classList.names.has("error")]);
    }};
    told({limit + 1}).then(() => told({limit})).then(() => console.log(JSON.stringify(said)));
    """
    script = tmp_path / "page.js"
    script.write_text(PAGE + program.replace('"use strict";', ""))
    run = subprocess.run(["node", script], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [[0, "large.tif is larger than 64 MiB.", True], [1, "it came", True]]


def png_of_size(width, height):
    """A PNG of a few bytes that says it is large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no image"),
        (b"<svg onload='alert(1)'/>", "damaged or no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "damaged or no image"),
        (encoded(Image.new("RGB", (30, 30)))[:60], "damaged or no image"),
        (png_of_size(60_000, 60_000), "too large"),
        (png_of_size(12_000, 12_000), "too large"),
        (encoded(Image.new("I;16", (20, 20))), "not 8 bits per channel"),
    ],
)
def test_what_is_no_image_is_refused(ask, content, message):
    before = ask("api/gallery")[2]
    status, _, body = ask("api/image", content)
    assert status == 400 and message in json.loads(body)["error"]
    assert ask("api/gallery")[2] == before


def test_pages_of_other_sites_are_kept_out(ask, server):
    content = encoded(Image.new("RGB", (8, 8)))
    assert ask("api/gallery", Host="attacker.example")[0] == 403
    assert ask("api/gallery", Origin="http://attacker.example")[0] == 403
    assert ask("api/image", content, Origin="null")[0] == 403
    status, _, body = ask("api/gallery", Host="localhost:1")  # as of a tunnel from another port
    port = server.server_port
    assert (
        status == 403 and f"127.0.0.1:{port} and localhost:{port} only; a tunnel" in json.loads(body)["error"]
    )


def test_browsers_do_not_name_the_port_of_http(server, monkeypatch):
    """At --port 80 every page was refused."""

    def status(host):
        client = http.client.HTTPConnection(*server.server_address, timeout=30)
        client.request("GET", "/api/gallery", headers={"Host": host, "Origin": f"http://{host}"})
        with client.getresponse() as answer:
            return answer.status

    assert status("127.0.0.1") == 403
    monkeypatch.setattr(server, "server_port", 80)
    assert [status(host) for host in ("127.0.0.1", "localhost:80", "attacker.example")] == [200, 200, 403]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("api/attention?image=0&model=0&x=36&y=0", 400, "pixel (36, 0) lies outside the image of 36x24"),
        ("api/attention?image=0&model=0&x=-1&y=0", 400, "x must be a number from 0, got '-1'"),
        ("api/attention?image=0&model=0&x=1", 400, "y must be a number from 0, got ''"),
        ("api/attention?image=0&model=0&x=1&y=1&recurrence=9", 400, "R must lie between 1 and 8, got 9"),
        ("api/attention?image=0&model=0&x=1&y=1&recurrence=0", 400, "R must lie between 1 and 8, got 0"),
        ("api/attention?image=0&model=1&x=1&y=1", 400, "none has no criss-cross attention"),
        ("api/attention?image=0&model=2&x=1&y=1", 400, "there is no model 2: there are 2"),
        ("api/image?image=99999", 400, "there is no image 99999"),
        (f"api/image?image={'1' * 5000}", 400, f"image must be a number from 0, got '{'1' * 40}'"),
        ("../../etc/passwd", 404, "there is no"),
        ("gallery.py", 404, "there is no /gallery.py here"),
    ],
)
def test_mistakes_are_one_sentence(ask, path, status, message):
    answered, headers, body = ask(path)
    assert answered == status and headers["Content-Type"] == "application/json"
    assert message in json.loads(body)["error"]


def test_a_long_upload_is_refused_before_it_is_read(ask):
    assert ask("api/image", b"x", **{"Content-Length": str(10**9)})[0] == 413


def test_a_file_of_the_largest_size_is_taken(ask, monkeypatch):
    content = encoded(Image.new("RGB", (8, 8)))
    module = sys.modules[ViewerServer.__module__]
    for limit, status in ((len(content), 200), (len(content) - 1, 413)):
        monkeypatch.setattr(module, "_LARGEST_UPLOAD", limit)
        assert ask("api/image", content)[0] == status


def test_a_length_of_thousands_of_digits_is_refused(ask):
    status, _, body = ask("api/image", b"x", **{"Content-Length": "1" * 5000})
    assert status == 400 and "a number of 5000 digits" in json.loads(body)["error"]


def test_uploads_to_elsewhere_and_of_no_length_are_refused(ask):
    status, _, body = ask("api/picture", encoded(Image.new("RGB", (8, 8))))
    assert status == 404 and json.loads(body)["error"] == "there is no /api/picture here."
    for length in ("", "-1", "two"):
        status, _, body = ask("api/image", b"x", **{"Content-Length": length})
        assert status == 411 and json.loads(body)["error"] == "an upload must say how long it is."


def test_an_address_that_is_none_is_refused(server):
    with socket.create_connection(server.server_address, timeout=30) as client:
        client.sendall(f"GET http://[::1 HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode())
        assert client.makefile("rb").readline() == b"HTTP/1.0 400 Bad Request\r\n"


@pytest.mark.parametrize(
    "request_text",
    [
        "GET /api/prediction?image=0&model=0 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n",
        "POST /api/image HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 1000\r\n\r\ncut short",
        "GET /api/gall",
    ],
)
def test_a_browser_that_goes_away_leaves_no_traceback(gallery, capfd, request_text):
    server = make_server(gallery)
    server.daemon_threads = False  # so that closing the server waits for them
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    client = socket.create_connection(server.server_address)
    client.sendall(request_text.format(port=server.server_port).encode())
    # Without lingering, closing resets the connection, as a browser does with what it no longer wants.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    time.sleep(0.1)
    server.shutdown()
    server.server_close()
    thread.join()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "request_text",
    [
        "",
        "GET /api/gall",
        "POST /api/image HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 1000\r\n\r\ncut short",
    ],
)
def test_a_browser_that_says_no_more_is_let_go_after_a_minute(gallery, capfd, monkeypatch, request_text):
    """Here after a three-hundredth of it, and without a traceback."""
    handler = sys.modules[ViewerServer.__module__]._Handler
    assert handler.timeout == 60
    monkeypatch.setattr(handler, "timeout", handler.timeout / 300)
    with make_server(gallery) as server:
        server.daemon_threads = False  # so that closing the server waits for them
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with socket.create_connection(server.server_address, timeout=30) as client:
            client.sendall(request_text.format(port=server.server_port).encode())
            assert client.recv(100) == b""
        server.shutdown()
        thread.join()
    assert capfd.readouterr().err == ""


def test_faults_of_the_server_are_printed(server, capfd):
    try:
        raise KeyError("fault")
    except KeyError:
        server.handle_error(None, ("127.0.0.1", 1))
    assert "KeyError" in capfd.readouterr().err


def test_a_fault_of_one_request_is_logged_and_the_next_is_answered(ask, gallery, monkeypatch, caplog):
    with monkeypatch.context() as broken:
        broken.setattr(gallery, "picture", lambda number: {}["fault"])
        status, _, body = ask("api/image?image=0")
    assert status == 500
    assert json.loads(body)["error"] == "the server met an error, which it printed."
    assert "GET /api/image?image=0 failed" in caplog.text and "KeyError: 'fault'" in caplog.text
    assert ask("api/image?image=0")[0] == 200


def test_an_image_deleted_since_the_start_is_told(photo, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(photo.read_bytes())
    with make_server(Gallery([("a", make_predictor())], [path])) as server:
        path.unlink()
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server.url + "api/image?image=0", timeout=30)
        with refused.value as answer:
            assert answer.code == 400 and "photo.png' cannot be read" in json.loads(answer.read())["error"]
        server.shutdown()
        thread.join()


def test_errors_before_serving(photo, server):
    with pytest.raises(UserError, match="none of the models has criss-cross attention"):
        Gallery([("none", make_predictor("model.sem_seg_head.context=none"))])
    clips = Predictor(instantiate(get_config("camvid/ccnet3d_T1_R_18_D8_half.py").model))
    with pytest.raises(UserError, match="attention is over clips, not single images"):
        Gallery([("R=2", make_predictor()), ("clips", clips)])
    with pytest.raises(UserError, match="needs a model"):
        Gallery([])
    with pytest.raises(UserError, match=f"port {server.server_port} cannot be used"):
        make_server(server.gallery, server.server_port)
    with pytest.raises(UserError, match="port 70000 cannot be used"):
        make_server(server.gallery, 70000)
    assert issubclass(UploadError, UserError)
