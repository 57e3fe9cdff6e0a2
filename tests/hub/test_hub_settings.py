"""What the environment says about hub, token, proxy and certificates is used, or refused at once by a sentence that
names the variable. Each download runs as the stage does, in its sandbox, with a home directory of its own.
"""

import os
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from huggingface_hub import constants
from test_misbehaving_hub import DATA, NAME, PLACE, gather, pin, recipe

from fake_hub import REVISION, STRANGER, TOKEN, Hub, trust_fake_hub
from kohaku_delta import params
from kohaku_delta.errors import UserError
from kohaku_delta.hub import client, fill_pins
from kohaku_delta.hub.pins import HubFile

ROOT = Path(__file__).resolve().parents[2]
FILE = HubFile("owner/name", "dataset", REVISION, "images/data-0001.tar")


@pytest.fixture
def hub(monkeypatch):
    with trust_fake_hub(monkeypatch) as hub:
        hub.add(NAME, DATA)
        yield hub


@pytest.fixture
def download(tmp_path):
    """Runs the stage with these variables; the home directory is tmp_path/home."""
    with Hub() as hub:
        hub.add(NAME, DATA)
        home = tmp_path / "home"
        home.mkdir()

        def run(*options, **variables):
            environment = recipe(tmp_path / "recipe", variables.pop("HF_ENDPOINT", hub.url), [pin()])
            environment = {
                key: value
                for key, value in environment.items()
                if not key.upper().endswith("_PROXY") and not key.startswith("SSL_")
            } | {"HOME": str(home), "HF_HOME": str(home / "cache")}
            started = time.monotonic()
            done = subprocess.run(
                [sys.executable, str(ROOT / "stages" / "download.py"), *map(str, options)],
                cwd=tmp_path / "recipe",
                env=environment | variables,
                capture_output=True,
                text=True,
            )
            assert "Traceback" not in done.stderr and time.monotonic() - started < 30
            return done

        run.hub, run.home, run.recipe = hub, home, tmp_path / "recipe"
        yield run


def arrived(done):
    assert done.returncode == 0, done.stderr
    assert "download: 1 files" in done.stdout


def test_nothing_is_asked_of_the_hub_but_the_files(download):
    arrived(download())
    (path,) = {path for server, _, path, *_ in download.hub.asked if server == "hub"}
    assert "/resolve/" in path
    assert not any(path.is_file() for path in download.home.rglob("*"))


def refused(done, *words):
    assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr


def test_a_socks_proxy_without_its_package_is_refused_with_the_package(download):
    refused(download(ALL_PROXY="socks5://user:secret@127.0.0.1:9"), "SOCKS proxy", "pip install socksio")


@pytest.mark.parametrize("address", ["socks4://127.0.0.1:9", "http://[::1"])
def test_a_proxy_without_a_usable_address_is_refused_and_its_password_is_not_shown(download, address):
    done = download(ALL_PROXY=address.replace("//", "//user:secret@"))
    refused(done, "ALL_PROXY, HTTPS_PROXY or HTTP_PROXY")
    assert "secret" not in done.stderr


def test_certificates_in_the_home_directory_are_read(download):
    certificates = download.home / "own" / "certificates.pem"
    certificates.parent.mkdir()
    certificates.write_bytes(Path(ssl.get_default_verify_paths().cafile or os.environ["SSL_CERT_FILE"]).read_bytes())
    (download.home / "link.pem").symlink_to(certificates)
    arrived(download(SSL_CERT_FILE=str(certificates)))
    arrived(download(SSL_CERT_FILE=str(download.home / "link.pem")))
    arrived(download(SSL_CERT_DIR=str(certificates.parent)))


def test_certificates_that_cannot_be_read_are_named_with_their_variable(download):
    (download.home / "bad.pem").write_text("no certificate")
    refused(download(SSL_CERT_FILE=str(download.home / "bad.pem")), "SSL_CERT_FILE names", "bad.pem")
    refused(download(SSL_CERT_FILE=str(download.home / "none.pem")), "SSL_CERT_FILE names", "none.pem")


@pytest.mark.parametrize("where", ["HF_TOKEN_PATH", "a link in HF_HOME", "a link by HF_TOKEN_PATH", "HF_HOME"])
def test_a_token_file_anywhere_in_the_home_directory_is_read(download, where):
    download.hub.gated.add("datasets/owner/name")
    secret, cache = download.home / "secrets" / "hub", download.home / "cache"
    for folder in (secret.parent, cache):
        folder.mkdir()
    secret.write_text(TOKEN + "\n")
    (download.home / "link").symlink_to(secret)
    variables = {
        "HF_TOKEN_PATH": {"HF_TOKEN_PATH": str(secret)},
        "a link by HF_TOKEN_PATH": {"HF_TOKEN_PATH": "~/link"},
    }.get(where, {})
    if where == "a link in HF_HOME":
        (cache / "token").symlink_to(secret)
    if where == "HF_HOME":
        (cache / "token").write_text(TOKEN)
    arrived(download(**variables))


@pytest.mark.parametrize(
    "variables, source",
    [
        ({"HF_TOKEN": "TOKEN"}, "HF_TOKEN"),
        ({"HUGGING_FACE_HUB_TOKEN": "TOKEN"}, "HUGGING_FACE_HUB_TOKEN"),
        ({"HF_TOKEN": "TOKEN", "HUGGING_FACE_HUB_TOKEN": "other"}, "HF_TOKEN"),
        ({"HF_TOKEN": " "}, "FILE"),
        ({}, "FILE"),
    ],
)
@pytest.mark.parametrize(
    "token, gated, sentence",
    [
        (STRANGER, True, "the token in SOURCE is not entitled"),
        ("hf_expired", True, "the token in SOURCE is not valid"),
        ("a b", False, "The token in SOURCE has characters that no token has"),
    ],
)
def test_a_refusal_names_where_the_token_came_from(
    hub, tmp_path, monkeypatch, variables, source, token, gated, sentence
):
    file = tmp_path / "token"
    file.write_text(token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(file))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("TOKEN", token))
    hub.gated |= {"datasets/owner/name"} if gated else set()
    with pytest.raises(UserError) as refusal:
        gather(tmp_path, tars=[pin()])
    assert sentence.replace("SOURCE", str(file) if source == "FILE" else source) in refusal.value.message


def test_a_token_file_that_is_no_text_is_refused(hub, tmp_path, monkeypatch):
    (tmp_path / "token").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match=f"The token in {tmp_path}/token has characters"):
        gather(tmp_path, tars=[pin()])


def test_no_token_is_sent_if_the_environment_forbids_it(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    gather(tmp_path, tars=[pin()])
    assert {each[4] for each in hub.asked} == {None}


@pytest.mark.parametrize("endpoint", ["hf-mirror.example", "hf-mirror.example/", "ftp://hub", "//hub", "https://", "h"])
def test_an_endpoint_without_a_scheme_is_refused_at_once(hub, monkeypatch, tmp_path, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(UserError, match=f"HF_ENDPOINT is '{endpoint}'. It must begin with https://"):
        gather(tmp_path, tars=[pin()])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_mirror_that_sends_on_elsewhere_is_named_with_where_to_at_once(hub, tmp_path, status):
    hub.elsewhere = (status, "https://hub.example/somewhere?signature=secret")
    with pytest.raises(
        UserError, match=r"is not a hub: it redirects to 'https://hub.example'. Set HF_ENDPOINT to"
    ) as raised:
        gather(tmp_path, tars=[pin()])
    assert "secret" not in raised.value.message and len(hub.asked) == 1


def test_a_mirror_of_another_revision_is_told_at_once(hub, tmp_path):
    hub.commit = "f" * 40
    with pytest.raises(UserError, match="answers for the revision 'ffff.* where 0123456789abcdef.* was asked for"):
        gather(tmp_path, tars=[pin()])
    assert len(hub.asked) == 1


def test_a_hub_that_wants_a_token_of_somebody_who_has_none_asks_for_one(hub, tmp_path):
    hub.elsewhere = (401, "")
    with pytest.raises(UserError, match="requires a token .401.. Set HF_TOKEN|not for nobody without a token"):
        gather(tmp_path, tars=[pin()])


@pytest.mark.parametrize("status", [403, 407])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_is_told_at_once(download, status, scheme):
    with Hub() as proxy:
        proxy.elsewhere = (status, "")
        endpoint = {} if scheme == "http" else {"HF_ENDPOINT": "https://hub.invalid"}
        address = proxy.url.replace("//", "//user:secret@")
        done = download(HTTP_PROXY=address, HTTPS_PROXY=address, NO_PROXY="", **endpoint)
        refused(done, str(status))
        assert (
            "secret" not in done.stderr and len(proxy.asked) <= 2
        )  # the library asks for a list of its own, once a day


@pytest.mark.parametrize("body", [200, 302])
def test_pin_tells_a_page_instead_of_a_hub_at_once(hub, tmp_path, body):
    hub.elsewhere = (body, "" if body == 200 else f"{hub.storage}/none")
    recipe(tmp_path, hub.url, [pin(bytes=None, sha256=None)])
    with pytest.raises(UserError, match="Correct HF_ENDPOINT"):
        fill_pins.fill_pins(tmp_path / "params.yaml", params.load(tmp_path / "params.yaml"))
    assert len(hub.requests("hub")) == 1


@pytest.mark.parametrize("status", [400, 404, 405, 410])
def test_a_mirror_that_knows_no_hub_is_told_at_once(hub, tmp_path, status):
    hub.elsewhere = (status, "")
    with pytest.raises(
        UserError, match=rf"is not a hub, or not one with owner/name: it answered {status} and no reason"
    ):
        gather(tmp_path, tars=[pin()])
    assert len(hub.asked) == 1


def test_a_page_instead_of_a_hub_is_told_at_once(hub, tmp_path):
    hub.elsewhere = (200, "")
    with pytest.raises(UserError, match="does not answer as a hub does"):
        gather(tmp_path, tars=[pin()])
    assert len(hub.asked) == 1


def test_a_certificate_that_is_not_trusted_is_told_at_once(hub, monkeypatch, tmp_path):
    key, name, now = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name.from_rfc4514_string("CN=localhost"),
        datetime.now(UTC),
    )
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "certificate.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    server = hub.servers[0]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setattr(constants, "ENDPOINT", f"https://localhost:{server.server_port}")
    with pytest.raises(UserError, match="its certificate is not trusted .self-signed certificate.*SSL_CERT_FILE"):
        client.list_files([FILE])


def test_a_password_in_the_endpoint_is_not_shown(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url.replace("//", "//user:secret@"))
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    hub.elsewhere = (404, "")
    with pytest.raises(UserError) as refusal:
        gather(tmp_path, tars=[pin()])
    assert "secret" not in refusal.value.message


def test_a_file_that_another_mirror_gave_is_read_again_without_naming_that_mirror(download):
    other = download.home / "share"
    path = other / PLACE.relative_to("mirror")
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    arrived(download("--mirror", other))
    assert (download.recipe / PLACE).is_symlink() and download.hub.asked == []
    arrived(download())
    assert download.hub.asked == []


def cached(folder, data):
    """A file as huggingface_hub keeps it: a link to a blob."""
    blob = folder / "datasets--owner--name" / "blobs" / "0123"
    link = folder / "datasets--owner--name" / "snapshots" / REVISION / "images" / "data-0001.tar"
    for path in (blob, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link.symlink_to("../../../blobs/0123")


def plain(folder, data):
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("data-0001.tar").write_bytes(data)


PLACES = {
    "a Hugging Face cache": (cached, ""),
    "the folder that holds the cache": (lambda folder, data: cached(folder / "hub", data), ""),
    "a copy of the repository": (lambda folder, data: plain(folder / "images", data), "sha256"),
    "a folder of files": (plain, "sha256"),
}


@pytest.mark.parametrize("place", PLACES)
def test_another_folder_as_a_mirror_is_used_after_hashing(hub, tmp_path, capsys, place):
    write, needs = PLACES[place]
    write(tmp_path / "share", DATA)
    gather(tmp_path / "a", tmp_path / "share", tars=[pin()])
    assert hub.asked == [] and (tmp_path / "a" / PLACE).read_bytes() == DATA
    gather(tmp_path / "b", tmp_path / "share", tars=[pin(sha256=None, bytes=None)])
    assert bool(hub.requests("storage")) == bool(needs)  # a name alone is no reason to take a file for the pinned one
    assert ("has none of the inputs" in capsys.readouterr().err) == bool(needs)
    write(tmp_path / "other", DATA[::-1])
    hub.asked.clear()
    gather(tmp_path / "c", tmp_path / "other", tars=[pin()])
    assert hub.requests("storage") and (tmp_path / "c" / PLACE).read_bytes() == DATA
    assert "It is damaged or another file. It is not used." in capsys.readouterr().err


def test_a_mirror_without_any_of_the_files_is_said_and_one_that_does_not_exist_is_refused(hub, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    gather(tmp_path / "a", tmp_path / "empty", tars=[pin()])
    assert f"--mirror {tmp_path}/empty has none of the inputs, neither as a mirror" in capsys.readouterr().err
    with pytest.raises(UserError, match="--mirror .*none is not a folder that exists"):
        gather(tmp_path / "a", tmp_path / "none", tars=[pin()])


def test_a_cache_in_the_home_directory_is_open_to_the_stage(download):
    cached(download.home / "elsewhere", DATA)
    arrived(download("--mirror", download.home / "elsewhere"))
    assert download.hub.asked == []


def offline_variable(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_server(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "cause, sentence",
    [(offline_variable, "HF_HUB_OFFLINE .* forbids it. Unset it"), (no_server, "`kohaku-delta pin` needs the network")],
)
def test_pin_says_at_once_that_there_is_no_network(hub, monkeypatch, tmp_path, cause, sentence):
    monkeypatch.setattr(client, "FIRST_WAIT", 60)
    recipe(tmp_path, hub.url, [pin(bytes=None, sha256=None)])
    cause(monkeypatch)
    started = time.monotonic()
    with pytest.raises(UserError, match=sentence):
        fill_pins.fill_pins(tmp_path / "params.yaml", params.load(tmp_path / "params.yaml"))
    assert time.monotonic() - started < 10 and hub.asked == []
