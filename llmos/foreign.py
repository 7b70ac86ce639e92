"""Models that other programs keep: read in place, never written to.

Known are the Hugging Face cache, Ollama's store and LM Studio's folders; each is a generator that finds
nothing where the program was never used. What is damaged is skipped with a warning.
Layouts: https://huggingface.co/docs/huggingface_hub/guides/manage-cache,
https://github.com/ollama/ollama/blob/main/docs/import.md (manifests as in the OCI image specification).

Owner: none; plain functions. Not here: LLMOS's own folder (store).
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from llmos.folders import Look, StoredModel
from llmos.paths import expand

Source = Callable[[Look], Iterator[StoredModel]]

HUGGING_FACE = "Hugging Face cache"
OLLAMA = "Ollama"
LM_STUDIO = "LM Studio"
MAX_MANIFEST_BYTES = 1 << 16
_PROJECTOR = "mmproj"  # the eyes of a model that sees: no model by itself
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_REVISION_DEPTH = 2  # folders below a snapshot, for quantisations or parts


def foreign_sources(environ: Mapping[str, str]) -> tuple[Source, ...]:
    """Where this user's other programs keep models, by their own environment variables."""
    hub = _hub_cache(environ)
    ollama = [expand(environ.get("OLLAMA_MODELS") or "~/.ollama/models")]
    if not environ.get("OLLAMA_MODELS"):
        ollama.append(Path("/usr/share/ollama/.ollama/models"))  # where Linux runs it as a service
    studio = [expand("~/.lmstudio/models"), expand("~/.cache/lm-studio/models")]
    return (
        lambda look: hugging_face(look, hub),
        lambda look: (model for root in ollama for model in ollama_store(look, root)),
        lambda look: (model for root in studio for model in lm_studio(look, root)),
    )


def _hub_cache(environ: Mapping[str, str]) -> Path:
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return expand(cache)
    if home := environ.get("HF_HOME"):
        return expand(home) / "hub"
    return expand(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def hugging_face(look: Look, hub: Path) -> Iterator[StoredModel]:
    """`models--ORG--REPO/snapshots/COMMIT/…`: files are links to blobs. The newest snapshot comes first."""
    for folder in look.folders(hub):
        if not folder.name.startswith("models--"):
            continue
        repo = folder.name.removeprefix("models--").replace("--", "/")
        snapshots = look.folders(folder / "snapshots")
        for snapshot in sorted(snapshots, key=_changed, reverse=True):
            if model := look.safetensors(snapshot, repo, HUGGING_FACE):
                yield model
            yield from _plain(look, snapshot, HUGGING_FACE, deep=_REVISION_DEPTH, prefix=repo + "/")


def lm_studio(look: Look, root: Path) -> Iterator[StoredModel]:
    """`PUBLISHER/REPO/FILE.gguf`."""
    for publisher in look.folders(root):
        for folder in look.folders(publisher):
            repo = f"{publisher.name}/{folder.name}"
            if model := look.safetensors(folder, repo, LM_STUDIO):
                yield model
            yield from _plain(look, folder, LM_STUDIO, deep=0, prefix=repo + "/")


def _plain(look: Look, folder: Path, origin: str, *, deep: int, prefix: str) -> Iterator[StoredModel]:
    try:
        for model in look.models(folder, origin, deep=deep, prefix=prefix):
            if not model.name.startswith(_PROJECTOR):
                yield model
    except FileNotFoundError:  # it went away while we looked
        return


def _changed(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def ollama_store(look: Look, root: Path) -> Iterator[StoredModel]:
    """`manifests/HOST/NAMESPACE/MODEL/TAG` names the blob with the weights."""
    for host in look.folders(root / "manifests"):
        for namespace in look.folders(host):
            for model in look.folders(namespace):
                for tag in _tags(look, model):
                    name = _ollama_name(host.name, namespace.name, f"{model.name}:{tag.name}")
                    if found := _ollama_model(look, root / "blobs", tag, name):
                        yield found


def _tags(look: Look, folder: Path) -> list[Path]:
    try:
        return [folder / name for name in look.files(folder, ("",))]
    except FileNotFoundError:
        return []


def _ollama_name(host: str, namespace: str, name: str) -> str:
    """As Ollama shows it: the defaults are left out."""
    if namespace != "library":
        name = f"{namespace}/{name}"
    return name if host == "registry.ollama.ai" else f"{host}/{name}"


def _ollama_model(look: Look, blobs: Path, manifest: Path, name: str) -> StoredModel | None:
    digest = _weights_digest(manifest)
    if digest is None:
        look.warnings.append(f"{manifest}: skipped: not a manifest that names a model")
        return None
    blob = blobs / f"sha256-{digest}"
    try:
        size = blob.stat().st_size
    except OSError as error:
        look.warnings.append(f"{manifest}: skipped: {blob.name}: {error.strerror}")
        return None
    return StoredModel(name, blob, "", OLLAMA, "gguf", f"ollama/{name}", (blob,), size)


def _weights_digest(manifest: Path) -> str | None:
    try:  # not blocking: what was a file when we looked may be a pipe by now
        with os.fdopen(os.open(manifest, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            content = json.loads(file.read(MAX_MANIFEST_BYTES))
        layers = [layer for layer in content["layers"] if layer["mediaType"].endswith("ollama.image.model")]
        match = _DIGEST.fullmatch(layers[0]["digest"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return match[1] if match else None
