"""Baton's one name among the packages of an environment: everything is imported as `baton.…`.

In a checkout the folders stand at the top and are linked from here (`v1`, the generated stubs, from
shared/gen); the wheel holds them as they are imported.
"""
