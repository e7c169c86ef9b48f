"""Engines: a whole optimizer step behind one seam."""
