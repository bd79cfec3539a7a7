"""The operator's nouns, as `client.admin`. They need the admin key."""

from typing import Any

from mixloom.transport import Object, Objects, Transport, given


class Admin:
    """Tenants and their keys, the queue, the daemons, drains."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def create_tenant(self, name: str, share: float = 1.0) -> Object:
        """`{"id", "key", …}`: the key is shown here and never again."""
        return self._transport.post("/admin/tenants", {"name": name, "share": share})

    def tenants(self) -> Objects:
        return list(self._transport.pages("/admin/tenants"))

    def tenant(self, tenant: str) -> Object:
        return self._transport.get(f"/admin/tenants/{tenant}")

    def change_tenant(self, tenant: str, **changes: Any) -> Object:
        """`name`, `share`."""
        return self._transport.patch(f"/admin/tenants/{tenant}", changes)

    def delete_tenant(self, tenant: str) -> Object:
        """Its keys stop working and its jobs are cancelled."""
        return self._transport.delete(f"/admin/tenants/{tenant}")

    def create_key(self, tenant: str, name: str = "key") -> Object:
        """`{"id", "key", …}`: the key is shown here and never again."""
        return self._transport.post(f"/admin/tenants/{tenant}/keys", {"name": name})

    def keys(self, tenant: str) -> Objects:
        return list(self._transport.pages(f"/admin/tenants/{tenant}/keys"))

    def revoke_key(self, tenant: str, key: str) -> Object:
        return self._transport.delete(f"/admin/tenants/{tenant}/keys/{key}")

    def queue(self) -> Objects:
        """Every tenant's jobs that have not ended, in order of submission."""
        return list(self._transport.pages("/admin/queue", order="asc"))

    def usage(self) -> Objects:
        """The tokens that each tenant has used."""
        return list(self._transport.pages("/admin/usage"))

    def daemons(self, limit: int = 20) -> Objects:
        """The last lives of engine daemons, the newest first."""
        return list(self._transport.pages("/admin/daemons", limit=limit))

    def current_drain(self, daemon: str | None = None) -> Object:
        """The drain of all daemons in force, or what is in force for one; `draining` is false when there is none.

        `at_rest` is true when every live daemon that it is for has let go of its runs. `named` are the drains in force
        of single daemons.
        """
        return self._transport.get("/admin/drain", given(daemon=daemon))

    def drain(
        self,
        mode: str = "quick",
        *,
        deadline_seconds: float | None = None,
        reason: str = "",
        daemon: str | None = None,
        exit: bool = False,
    ) -> Object:
        """Let training come to rest: quick, graceful or fast. Holds until `undrain`, across restarts.

        `daemon`: only in daemons of this name.
        """
        wish = given(mode=mode, deadline_seconds=deadline_seconds, reason=reason, daemon=daemon, exit=exit)
        return self._transport.post("/admin/drain", wish)

    def undrain(self, daemon: str | None = None) -> Object:
        """End the drain of all daemons, or that of one; the answer has what is still in force."""
        return self._transport.post("/admin/undrain", given(daemon=daemon))
