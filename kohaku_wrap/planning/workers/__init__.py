"""Processes that answer one question with heavy packages loaded, and print JSON."""
