"""Processes that compute with torch; started by module name, never imported by the rest."""
