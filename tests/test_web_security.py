"""The service under attack: each attack is tried against a real server on loopback."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlencode

import pytest
from commandline import Cli
from conftest import painted
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from serving import Answer, Server, opened_service, serving

from indexer import build
from searchengine.errors import UsageError
from searchengine.models.registry import load_encoder
from searchengine.web.app import create_app
from searchengine.web.problems import tell_problems
from searchengine.web.security import HEADERS, Access, Guard
from searchengine.web.service import Service
from searchengine.web.uploads import MAX_FIELDS, MAX_IMAGES, MAX_OTHER_BYTES, MAX_UPLOAD_BYTES, BodyLimit, read_upload

TOKEN = "correct-horse_battery.staple"
FOREIGN = "https://evil.example"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:1/x"/><script>alert(1)</script></svg>'


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "photos").mkdir()
    for number in range(4):
        painted(number).save(folder / "photos" / f"{number}.png")
    (folder / "secret.png").write_bytes((folder / "photos" / "1.png").read_bytes())
    build(folder / "index", [folder / "photos"], encoder=load_encoder("mini"))
    return folder


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[Service]:
    with opened_service(home / "index", home=home) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(service: Service) -> Iterator[Server]:
    """Without a token, as on the machine of its user."""
    with serving(create_app(service, Access())) as running:
        yield running


@pytest.fixture(scope="module")
def locked(service: Service) -> Iterator[Server]:
    """With a token."""
    with serving(create_app(service, Access(token=TOKEN))) as running:
        yield running


def form(*parts: tuple[str, bytes], boundary: str = "b") -> tuple[list[tuple[str, str | bytes]], bytes]:
    """Headers and body of a multipart form; a part is its header lines and its content."""
    body = b"".join(
        b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary.encode(), head.encode(), content) for head, content in parts
    )
    return [("Content-Type", f"multipart/form-data; boundary={boundary}")], body + f"--{boundary}--\r\n".encode()


def image(content: bytes, *, name: str = "x.png") -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="image"; filename="{name}"', content


def assert_refused(answer: Answer, *statuses: int) -> None:
    assert answer.status in statuses, (answer.status, answer.body[:300])
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json["status"] == answer.status
    assert_hardened(answer)


def assert_hardened(answer: Answer) -> None:
    assert HEADERS.keys() - {"cache-control", "content-security-policy"} <= answer.headers.keys()
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy or "sandbox" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "server" not in answer.headers
    assert "access-control-allow-origin" not in answer.headers


# -- DNS rebinding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example@127.0.0.1",
        "127.0.0.1@evil.example",
        "127.0.0.1/evil.example",
        "192.168.0.7",
        "0.0.0.0",
        "2130706433",
        "[::1",
        "[fe80::1]",
        "",
    ],
)
def test_a_name_that_was_rebound_to_the_service_gets_nothing(server: Server, host: str) -> None:
    for target in ("/api/search?q=x", "/api/images/1", "/", "/healthz", "/openapi.json", "/metrics"):
        assert_refused(server.ask(target, headers=[("Host", host)]), 421)


def test_the_service_answers_to_its_own_names(server: Server) -> None:
    for host in (server.host, "localhost", f"localhost:{server.port}", "LOCALHOST", "127.0.0.1", "[::1]:8000"):
        assert server.ask("/healthz", headers=[("Host", host)]).status == 200


def test_two_hosts_or_none_get_nothing(server: Server) -> None:
    two = server.say(
        b"GET /api/images/1 HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    )
    assert two.split()[1] in (b"400", b"421")
    assert server.say(b"GET /api/images/1 HTTP/1.0\r\n\r\n").split()[1] in (b"400", b"421")


def test_names_are_those_allowed_and_addresses_only_where_other_machines_are_let_in() -> None:
    local = Access(allowed_hosts=("Photos.example",))
    assert local.knows("photos.example")
    assert local.knows("photos.example.:443")
    assert not local.knows("10.0.0.1")
    everywhere = Access(host="0.0.0.0", token=TOKEN)
    assert everywhere.knows("10.0.0.1:8000")
    assert everywhere.knows("[2001:db8::1]:8000")
    assert not everywhere.knows("photos.example")
    assert Access(host="nas.local", token=TOKEN).knows("nas.local:8000")


@given(st.text(max_size=40))
def test_whatever_host_is_sent_is_known_or_not_and_never_an_error(host: str) -> None:
    Access().knows(host)


# -- foreign pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [FOREIGN, "null", "http://127.0.0.1:1", "http://localhost", "file://", "", "x"])
def test_a_foreign_page_can_post_nothing(server: Server, origin: str) -> None:
    headers, body = form(image(b"x"))
    for target in ("/api/search", "/api/classify", "/login", "/logout"):
        assert_refused(server.ask(target, method="POST", headers=[*headers, ("Origin", origin)], body=body), 403)
    plain = [("Content-Type", "text/plain"), ("Origin", origin)]
    assert_refused(server.ask("/api/search", method="POST", headers=plain, body=b'{"vector": []}'), 403)
    assert_refused(server.ask("/api/search?q=x", headers=[("Origin", origin)]), 403)
    assert_refused(server.ask("/api/search", method="OPTIONS", headers=[("Origin", origin)]), 403)


def test_a_foreign_page_that_tells_no_origin_is_known_by_what_its_browser_says(server: Server) -> None:
    for site in ("cross-site", "same-site", "nonsense"):
        for mode, dest in (("no-cors", "image"), ("navigate", "iframe"), ("navigate", "embed"), ("cors", "empty")):
            told = [("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", mode), ("Sec-Fetch-Dest", dest)]
            for target in ("/api/images/1", "/api/images/1/thumbnail", "/api/search?q=x", "/", "/page/main.js"):
                assert_refused(server.ask(target, headers=told), 403)
        told = [("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Dest", "document")]
        assert_refused(server.ask("/login", method="POST", headers=told, body=b"token=x"), 403)
        assert server.ask("/", headers=told).status == 200  # a link


def test_the_services_own_page_may_ask(server: Server) -> None:
    told = [("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Mode", "cors"), ("Sec-Fetch-Dest", "empty")]
    assert server.ask("/api/search?q=x", headers=told).status == 200
    own = [("Origin", server.address), ("Content-Type", "application/json")]
    assert server.ask("/api/search", method="POST", headers=own, body=b'{"q": "x"}').status == 200


def test_a_simple_form_that_smuggles_json_is_not_read_as_json(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.ask("/api/search", method="POST", headers=[("Content-Type", kind)], body=b'{"q": "x"}')
        assert_refused(answer, 400, 415, 422)


def test_no_other_site_may_show_an_image_of_the_service(server: Server) -> None:
    for target in ("/api/images/1", "/api/images/1/thumbnail"):
        answer = server.ask(target)
        assert answer.status == 200
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "private" in answer.headers["cache-control"]


# -- the token -------------------------------------------------------------------------------------------------------

GUARDED = (
    "/api/search?q=x",
    "/api/images/1",
    "/api/images/1/thumbnail",
    "/api/images/1/details",
    "/api/images/1/similar",
    "/api/status",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/no-such-thing",
    "//api/search?q=x",
    "/page/../api/search?q=x",
    "/page/%2e%2e/api/images/1",
    "/page/..%2fapi%2fimages%2f1",
    "/healthz/../api/images/1",
    "/API/images/1",
)


def test_without_the_token_only_the_bare_page_and_the_sign_of_life_are_open(locked: Server) -> None:
    for target in GUARDED:
        answer = locked.ask(target)
        if target.startswith("/page/"):
            assert_refused(answer, 404)
        else:
            assert_refused(answer, 401)
            assert answer.headers["www-authenticate"].startswith("Bearer")
    for target in ("/", "/page/main.js", "/healthz"):
        assert locked.ask(target).status == 200
    for target in ("/api/search", "/api/classify", "/logout"):
        assert_refused(locked.ask(target, method="POST", body=b"{}"), 401)


def test_the_token_opens_by_header_and_by_the_cookie_that_it_is_exchanged_for(locked: Server) -> None:
    assert locked.ask("/api/search?q=x", headers=[("Authorization", f"Bearer {TOKEN}")]).status == 200
    answer = locked.ask("/login", method="POST", headers=FORM, body=urlencode({"token": TOKEN}).encode())
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    flags = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/"} <= flags
    assert not any(flag.startswith("domain") for flag in flags)
    assert TOKEN not in cookie
    kept = cookie.split(";")[0]
    assert locked.ask("/api/images/1", headers=[("Cookie", f"other=1; {kept}")]).status == 200
    gone = locked.ask("/logout", method="POST", headers=[("Cookie", kept)])
    assert (gone.status, "Max-Age=0" in gone.headers["set-cookie"]) == (303, True)


FORM: list[tuple[str, str | bytes]] = [("Content-Type", "application/x-www-form-urlencoded")]


@pytest.mark.parametrize(
    "guess",
    [
        "",
        TOKEN[:-1],
        TOKEN + "x",
        TOKEN.upper(),
        f"{TOKEN}\xe9",
        "None",
        "null",
        "*",
        "\x00",
        "x" * 60_000,
    ],
)
def test_a_guessed_token_opens_nothing(locked: Server, guess: str) -> None:
    answer = locked.ask("/login", method="POST", headers=FORM, body=urlencode({"token": guess}).encode())
    assert_refused(answer, 400, 401, 422)
    assert "set-cookie" not in answer.headers
    if "\x00" in guess:
        return
    for name, value in (
        ("Authorization", f"Bearer {guess}"),
        ("Authorization", f"Basic {guess}"),
        ("Authorization", guess),
        ("Cookie", f"{Access(token=TOKEN).cookie_name}={guess}"),
        ("X-Token", TOKEN),
    ):
        answer = locked.ask("/api/images/1", headers=[(name, value.encode("utf-8"))])
        assert answer.status in (400, 401, 431)


def test_who_has_no_token_is_not_listened_to(locked: Server) -> None:
    head = (
        f"POST /api/search HTTP/1.1\r\nHost: {locked.host}\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"Content-Length: {MAX_UPLOAD_BYTES}\r\nConnection: close\r\n\r\n"
    )
    assert locked.say(head.encode(), seconds=5).split()[1] == b"401"


def test_the_token_in_an_address_opens_nothing(locked: Server) -> None:
    assert_refused(locked.ask(f"/api/images/1?token={TOKEN}"), 401)
    assert_refused(locked.ask(f"/login?token={TOKEN}"), 405)


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    access = Access(token=TOKEN)
    assert access.is_token(TOKEN)
    assert not access.is_token("x")
    assert [other for _, other in compared] == [TOKEN.encode()] * 2


@pytest.mark.parametrize("token", ["", " ", "a b", "a\nb", "a\r\nSet-Cookie: x", "p\xe4ss", "\x00"])
def test_a_token_that_no_header_can_carry_is_refused_at_once(token: str) -> None:
    with pytest.raises(UsageError, match="token"):
        Access(token=token)


def test_over_tls_the_cookie_is_secure() -> None:
    access = Access(token=TOKEN)
    assert access.cookie(is_secure=True).endswith("; Secure")
    assert "Secure" not in access.cookie(is_secure=False)
    assert access.cookie_name != Access(token="another").cookie_name


def test_nobody_can_send_files_to_the_login(locked: Server) -> None:
    headers, body = form(image(b"x" * 100_000), ('Content-Disposition: form-data; name="token"', TOKEN.encode()))
    assert_refused(locked.ask("/login", method="POST", headers=headers, body=body), 415)


def test_where_there_is_no_token_there_is_nothing_to_log_in_to(server: Server) -> None:
    assert_refused(server.ask("/login", method="POST", headers=FORM, body=b"token=x"), 404)


# -- paths and ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        "../secret.png",
        "..%2f..%2fsecret.png",
        "%2e%2e/%2e%2e/secret.png",
        "....//secret.png",
        "..%5csecret.png",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:1/",
        "1%00.png",
        "1/../2",
        "0",
        "-1",
        "1e3",
        "0x1",
        "9223372036854775808",
        "1" * 5000,
        "%ff",
        "1;2",
        "1 OR 1=1",
    ],
)
def test_only_an_id_of_the_index_leads_to_a_file(server: Server, home: Path, part: str) -> None:
    secret = (home / "secret.png").read_bytes()
    part = part.replace(" ", "%20")
    for target in (
        f"/api/images/{part}",
        f"/api/images/{part}/thumbnail",
        f"/api/images/{part}/details",
        f"/page/{part}",
    ):
        answer = server.ask(target)
        assert_refused(answer, 404, 414, 422)
        assert secret not in answer.body
        assert b"root:" not in answer.body


def test_a_query_names_no_file_of_the_server(server: Server, home: Path) -> None:
    secret = str(home / "secret.png")
    assert os.path.isfile(secret)
    for query in (f"image:{secret}", f'image:"{secret}"', f"x + image:{secret}", "image:/etc/passwd"):
        assert_refused(server.ask(f"/api/search?{urlencode({'q': query})}"), 400)
    # Such text is a description, so what it finds tells nothing of the file.
    there = server.ask(f"/api/search?{urlencode({'q': secret})}")
    gone = server.ask(f"/api/search?{urlencode({'q': secret.replace('secret', 'no-such')})}")
    assert there.status == gone.status
    if there.status == 200:
        assert [hit["score"] for hit in there.json["hits"]] != [1.0]


@pytest.mark.parametrize("ranges", ["bytes=0-0,0-0", "bytes=" + ",".join(["0-"] * 1300), "bytes=0-9,5-14,-5"])
def test_many_and_overlapping_ranges_get_the_file_once(server: Server, home: Path, ranges: str) -> None:
    whole = server.ask("/api/images/1").body
    answer = server.ask("/api/images/1", headers=[("Range", ranges)])
    assert (answer.status, answer.body) == (200, whole)


@pytest.mark.parametrize(
    "ranges", ["bytes=0-99999999999999999999", "bytes=-0", "bytes=9-1", "bytes=--1", "bytes=a-b", "x=0-1", "bytes", ""]
)
def test_ranges_that_make_no_sense_harm_nobody(server: Server, ranges: str) -> None:
    answer = server.ask("/api/images/1", headers=[("Range", ranges)])
    assert answer.status in (200, 416)


def test_a_range_of_blanks_does_not_hold_up_the_service(server: Server) -> None:
    started = time.monotonic()
    server.ask("/api/images/1", headers=[("Range", f"bytes={' ' * 60_000}x")])
    assert time.monotonic() - started < 1


def test_only_some_of_many_mistakes_are_told(server: Server) -> None:
    body = json.dumps({f"field{number}": 0 for number in range(50_000)}).encode()
    answer = server.ask("/api/search", method="POST", headers=[("Content-Type", "application/json")], body=body)
    assert_refused(answer, 422)
    assert 0 < len(answer.json["errors"]) < 100
    assert len(answer.body) < 10_000


# -- uploads ---------------------------------------------------------------------------------------------------------


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(server: Server) -> None:
    for kind, limit in (("multipart/form-data; boundary=b", MAX_UPLOAD_BYTES), ("application/json", MAX_OTHER_BYTES)):
        for size in (limit + 1, 10**18, 10**30):
            head = (
                f"POST /api/search HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: {kind}\r\n"
                f"Content-Length: {size}\r\nConnection: close\r\n\r\n"
            )
            started = time.monotonic()
            assert server.say(head.encode(), seconds=5).split()[1] in (b"413", b"400")
            assert time.monotonic() - started < 4


def test_a_body_in_chunks_is_refused_once_it_is_too_large(server: Server) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        while sent < 3 * MAX_UPLOAD_BYTES:
            sent += 2**20
            yield bytes(2**20)

    headers, _ = form()
    try:
        answer = server.ask("/api/search", method="POST", headers=headers, body=endless())
    except (BrokenPipeError, ConnectionResetError):  # it is not listened to any more
        pass
    else:
        assert_refused(answer, 413)
    small = [("Content-Type", "application/json")]
    chunks = [b'{"q": "', *[b"x" * 2**18] * 8, b'"}']
    assert_refused(server.ask("/api/search", method="POST", headers=small, body=chunks), 413)
    assert server.ask("/healthz").status == 200


def test_a_slow_upload_is_not_waited_for() -> None:
    app = FastAPI()
    tell_problems(app)

    @app.post("/upload")
    async def upload(request: Request) -> int:
        return len((await read_upload(request)).images)

    app.add_middleware(BodyLimit, idle_seconds=0.3, total_seconds=1.5)
    app.add_middleware(Guard, access=Access())
    with serving(app) as slow:
        head = (
            f"POST /upload HTTP/1.1\r\nHost: {slow.host}\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            "Content-Length: 1000\r\nConnection: close\r\n\r\n--b\r\n"
        ).encode()
        started = time.monotonic()
        assert slow.say(head).split()[1] == b"408"
        assert 0.2 < time.monotonic() - started < 1.3
        # One that sends a byte now and then never stops for long, and takes too long in all.
        with socket.create_connection(("127.0.0.1", slow.port), timeout=10) as connection:
            connection.sendall(head)
            received = threading.Event()

            def drip() -> None:
                while not received.wait(0.1):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

            dripping = threading.Thread(target=drip)
            dripping.start()
            assert connection.recv(65536).split()[1] == b"408"
            received.set()
            dripping.join()
        headers, body = form(image(b"x"), image(b"y"))
        assert slow.ask("/upload", method="POST", headers=headers, body=body).json == 2


def test_all_uploads_together_take_no_more_memory_than_they_may() -> None:
    app = FastAPI()
    tell_problems(app)

    @app.post("/upload")
    async def upload(request: Request) -> int:
        return len((await read_upload(request)).images)

    app.add_middleware(BodyLimit, max_bytes_together=100_000)
    headers, body = form(image(bytes(60_000)))
    with serving(app) as crowded:
        head = (
            f"POST /upload HTTP/1.1\r\nHost: {crowded.host}\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", crowded.port)) as connection:
            connection.sendall(head.encode() + body[:-1])
            time.sleep(0.3)
            for _ in range(3):
                refused = crowded.ask("/upload", method="POST", headers=headers, body=body)
                assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            connection.sendall(body[-1:])
            assert connection.recv(65536).split()[1] == b"200"
        assert crowded.ask("/upload", method="POST", headers=headers, body=body).status == 200


@pytest.mark.parametrize(
    "parts, reason",
    [
        ([image(b"x")] * (MAX_IMAGES + 1), "Too many files"),
        ([('Content-Disposition: form-data; name="q"', b"x")] * (MAX_FIELDS + 1), "Too many fields"),
        ([('Content-Disposition: form-data; name="q"', b"x" * 70_000)], "maximum size"),
        ([(f'Content-Disposition: form-data; name="q"\r\nX: {"y" * 100_000}', b"x")], ""),
        ([("X: y\r\n" * 500 + 'Content-Disposition: form-data; name="q"', b"x")], ""),
        ([("Content-Type: image/png", b"no name")], ""),
        ([('Content-Disposition: form-data; name="other"; filename="x.png"', b"x")], "send it as 'image'"),
        ([('Content-Disposition: form-data; name="' + "q" * 3000 + '"', b"x")], ""),
    ],
    ids=["files", "fields", "long field", "long header", "many headers", "no name", "another name", "long name"],
)
def test_forms_of_too_many_or_too_large_parts_are_refused(
    server: Server, parts: list[tuple[str, bytes]], reason: str
) -> None:
    headers, body = form(*parts)
    for target in ("/api/search", "/api/classify"):
        answer = server.ask(target, method="POST", headers=headers, body=body)
        assert_refused(answer, 400, 413, 422)
        assert reason in answer.json["detail"]


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "b" * 5000,
        "multipart/form-data; boundary=another",
        "multipart/form-data; boundary=b; charset=idna",
        "multipart/form-data; boundary=b; charset=zlib",
        "multipart/form-data; boundary=b; charset=unicode_escape",
        "multipart/form-data; boundary=b; charset=utf-7",
        "multipart/mixed; boundary=b",
        "application/xml",
        "image/png",
        "\xff\xff",
    ],
)
def test_a_form_that_makes_no_sense_is_the_clients_mistake(server: Server, kind: str) -> None:
    _, body = form(('Content-Disposition: form-data; name="q"', b"\\ud800 \xff\xfe +AAA- xn--0"))
    answer = server.ask("/api/search", method="POST", headers=[("Content-Type", kind.encode("latin-1"))], body=body)
    assert answer.status in (200, 400, 413, 415, 422), answer.body


def test_code_bombs_and_hostile_files_are_no_pictures_and_harm_nobody(server: Server, data: Path) -> None:
    nasty = [file for file in sorted((data / "nasty").rglob("*")) if file.is_file() and file.stat().st_size < 30_000]
    uploads = {
        "x.svg": SVG,
        "x.html": b"<!doctype html><script>alert(1)</script>",
        "x.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file",
        "bomb.ppm": b"P6 60000 60000 255\n" + bytes(100),
        "empty.png": b"",
    }
    for name, content in uploads.items():
        headers, body = form(image(content, name=name))
        answer = server.ask("/api/search", method="POST", headers=headers, body=body)
        assert_refused(answer, 415, 422)
        assert name in answer.json["detail"]
    statuses = set()
    for file in nasty[:: len(nasty) // 20]:
        headers, body = form(image(file.read_bytes()))
        answer = server.ask("/api/search", method="POST", headers=headers, body=body)
        assert answer.status in (200, 415, 422), (file, answer.body)
        statuses.add(answer.status)
    assert len(statuses) > 1
    assert server.ask("/api/search?q=x").status == 200


def test_the_name_of_an_upload_is_shown_harmless(server: Server) -> None:
    headers, body = form(image(b"x", name="<script>\x1b[2J\x07.png"))
    answer = server.ask("/api/search", method="POST", headers=headers, body=body)
    assert_refused(answer, 415, 422)
    assert answer.json["detail"].isprintable()


def test_no_address_that_is_sent_is_ever_fetched(server: Server) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as trap:
        trap.settimeout(0.2)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        server.ask(f"/api/search?{urlencode({'q': url})}")
        server.ask(f"/api/search?{urlencode({'q': f'image:{url}'})}")
        server.ask(f"/api/search?{urlencode({'under': url})}")
        server.ask(f"/api/images/{url}")
        for content in (SVG.replace(b"http://127.0.0.1:1/x", url.encode()), url.encode()):
            headers, body = form(image(content), ('Content-Disposition: form-data; name="image"', url.encode()))
            server.ask("/api/search", method="POST", headers=headers, body=body)
        as_json = [("Content-Type", "application/json")]
        server.ask("/api/search", method="POST", headers=as_json, body=b'{"image": "%b"}' % url.encode())
        with pytest.raises(TimeoutError):
            trap.accept()


# -- answers ---------------------------------------------------------------------------------------------------------


def test_every_answer_is_hardened_whatever_it_is(server: Server) -> None:
    for method, target, status in (
        ("GET", "/", 200),
        ("GET", "/page/main.js", 200),
        ("GET", "/healthz", 200),
        ("GET", "/readyz", 200),
        ("GET", "/metrics", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/api/search?q=x", 200),
        ("GET", "/api/images/1", 200),
        ("GET", "/api/images/1/thumbnail", 200),
        ("GET", "/api/images/x", 422),
        ("GET", "/no-such-thing", 404),
        ("DELETE", "/api/images/1", 405),
        ("TRACE", "/", 405),
        ("PUT", "/api/images/1", 405),
    ):
        answer = server.ask(target, method=method)
        assert answer.status == status, target
        assert_hardened(answer)
    assert server.ask("/").headers["content-security-policy"] == HEADERS["content-security-policy"]


def test_an_error_of_the_services_own_is_hardened_and_tells_nothing() -> None:
    app = FastAPI()
    tell_problems(app)

    @app.get("/boom")
    async def boom() -> None:
        raise RuntimeError("the secret is 4711")

    app.add_middleware(Guard, access=Access())
    with serving(app) as broken:
        answer = broken.ask("/boom")
        assert_refused(answer, 500)
        assert b"4711" not in answer.body


def test_web_sockets_are_not_spoken(server: Server) -> None:
    upgrade = (
        f"GET / HTTP/1.1\r\nHost: {server.host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert b" 101 " not in server.say(upgrade.encode(), seconds=0.3)


@pytest.mark.usefixtures("own_home")
def test_other_machines_are_let_in_only_with_a_token_or_at_the_users_word(cli: Cli, home: Path) -> None:
    for host in ("0.0.0.0", "::", "nas.example"):
        outcome = cli("serve", "--index", home / "index", "--port", "0", "--host", host)
        assert outcome.code == 2
        assert "--token" in outcome.err
