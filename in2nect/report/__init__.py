"""Figures, tables and the files they are written to. Import from the modules: matplotlib is loaded by
`report.figures` alone.
"""
