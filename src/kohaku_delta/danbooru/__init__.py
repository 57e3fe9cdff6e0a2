"""The room of what was published: the danbooru2023 database, its tars, and the images in them."""
