"""Readers of published file formats whose points have labels, a module for each."""
