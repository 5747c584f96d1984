"""What has to be installed beside this package: it is looked for, built and tried here."""
