"""The danbooru2023 sqlite database as arrays: the only room with SQL."""
