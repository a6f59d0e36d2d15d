"""Figures, tables, and curves out of a run's log. Import from the modules: matplotlib is loaded by
`report.figures` alone.
"""
