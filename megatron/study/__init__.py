"""Studies: arms that share trunks, planned as one graph of training stages."""
