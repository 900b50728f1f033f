"""Migrations of the control plane's database, run by `control.database`; one file per change."""
