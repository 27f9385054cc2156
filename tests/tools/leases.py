"""Commits by whoever holds the lease at that moment."""


async def put(store, key, change, *, expected, commit_id, **options):
    """Acquire the session and commit to it, as a server does in a turn."""
    lease = await store.acquire(key, "tester", seconds=30)
    return await store.commit(lease, change, expected=expected, commit_id=commit_id, **options)
