"""The quickstart: the whole road on one machine, each step as users run it.

Nothing here is a path of its own: every step calls the room that does it everywhere else.
"""
