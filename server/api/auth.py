"""Keys as secrets: how one is made, and what of it is kept. Knows no HTTP and no SQL."""

import hashlib
import hmac
import secrets
import string

BRAND = "mxl_"
BRANDS = (BRAND, "tml-")
"""One body is valid under either brand: clients of the interactive protocol insist on the second."""

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_BODY_CHARACTERS = 43  # 256 bits


def new_secret() -> str:
    """A tenant's key, to show once."""
    return BRAND + "".join(secrets.choice(_BASE62) for _ in range(_BODY_CHARACTERS))


def hash_of_secret(secret: str) -> str:
    """What the table keeps of a key: sha256 of what follows the brand (256 random bits need no slow hash)."""
    for brand in BRANDS:
        secret = secret.removeprefix(brand)
    return sha256(secret)


def sha256(text: str) -> str:
    """Hex digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_admin_key(secret: str, admin_key_sha256: str) -> bool:
    """Whether a secret is the operator's key, in a time that does not depend on where they differ."""
    return hmac.compare_digest(sha256(secret), admin_key_sha256)
