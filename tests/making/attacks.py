"""Names by which a header may not be able to reach anything outside its folder."""

from __future__ import annotations

ATTACKS = [
    "/etc/passwd", "../secret.raw", "sub/../../secret.raw", "file:///etc/passwd",
    "http://example.org/x.raw",
    "link.raw", "linked/secret.raw", "/dev/zero", "", "..", ".", "missing.raw", "C:\\x.raw",
    "..\\secret.raw", "a\0b",
    "pipe.raw", "self.raw",
]  # fmt: skip
