"""What licence a project says it has: package metadata first, then the wording of its licence files."""

import json
import posixpath
import re

# Telltale sentences, in order: a stricter text may quote a looser one.
_WORDINGS = (
    ("AGPL", "gnu affero general public license"),
    ("LGPL", "gnu lesser general public license"),
    ("LGPL", "gnu library general public license"),
    ("GPL", "gnu general public license"),
    ("MPL-2.0", "mozilla public license"),
    ("EPL", "eclipse public license"),
    ("PSF-2.0", "python software foundation license"),
    ("Apache-2.0", "apache license"),
    ("Apache-2.0", "apache.org/licenses/license-2.0"),
    ("BSL-1.0", "boost software license"),
    ("Unlicense", "free and unencumbered software released into the public domain"),
    ("Zlib", "altered source versions must be plainly marked"),
    ("BSD-3-Clause", "neither the name of"),
    ("BSD-3-Clause", "names of its contributors may"),
    ("BSD-2-Clause", "redistributions of source code must retain"),
    ("MIT", "permission is hereby granted, free of charge, to any person obtaining"),
    ("ISC", "permission to use, copy, modify, and/or distribute this software for any purpose"),
    ("ISC", "permission to use, copy, modify, and distribute this software for any purpose"),
    ("public domain", "public domain"),
)
_METADATA_NAMES = {"metadata", "pkg-info"}
_LICENSE_NAME = re.compile(r"(licen[cs]e|copying|unlicense)([-_.].*)?$")
_CLASSIFIER = re.compile(r"^Classifier: License :: (?:OSI Approved :: )?(.+)$", re.M)
_EXPRESSION = re.compile(r"^License-Expression: *(\S.*)$", re.M)
_FIELD = re.compile(r"^License: *(\S.*)$", re.M)
_TOML_FIELD = re.compile(r'^license *= *"([^"]+)"', re.M)


def may_state_license(path: str) -> bool:
    """Whether a file of this name is where projects state their licence."""
    name = posixpath.basename(path).lower()
    named = name in _METADATA_NAMES or name in ("package.json", "cargo.toml", "copyright")
    return named or _LICENSE_NAME.match(name) is not None


def license_claim(path: str, text: str) -> str:
    """The licence that the file at `path` states for its project, or ''."""
    name = posixpath.basename(path).lower()
    if name in _METADATA_NAMES:
        return _from_metadata(text)
    if name == "package.json":
        return _from_package_json(text)
    if name == "cargo.toml":
        found = _TOML_FIELD.search(text)
        return found.group(1) if found else ""
    if name == "copyright" and "/doc/" in f"/{path}":
        return " AND ".join(dict.fromkeys(_FIELD.findall(text))) or _from_wording(text)
    return _from_wording(text) if _LICENSE_NAME.match(name) else ""


def claim_rank(path: str) -> tuple[bool, int]:
    """Sort key of claims, best first: metadata before licence texts, then by depth in the project."""
    return bool(_LICENSE_NAME.match(posixpath.basename(path).lower())), path.count("/")


def _from_metadata(text: str) -> str:
    header = text.split("\n\n", 1)[0]
    if expression := _EXPRESSION.search(header):
        return expression.group(1)
    # A long License field is the beginning of the licence's text.
    fields = [field for field in _FIELD.findall(header) if len(field) <= 40 and field != "UNKNOWN"]
    return fields[0] if fields else " OR ".join(_CLASSIFIER.findall(header))


def _from_package_json(text: str) -> str:
    try:
        found = json.loads(text).get("license", "")
    except (ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) else ""


def _from_wording(text: str) -> str:
    words = " ".join(text.lower().split())
    return next((name for name, telltale in _WORDINGS if telltale in words), "")
