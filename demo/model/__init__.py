"""The demo's tiny model: the page it knows by heart, the script that makes it, and the result."""
