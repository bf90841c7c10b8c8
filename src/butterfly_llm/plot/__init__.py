"""Figures as PNG or SVG: `butterfly plot NAME`. A module for each kind; `canvas` is what they share."""
