"""Trials by bad input, damage, kills and exhaustion: seeded cases in groups, each with a verdict."""
