//! Files that are replaced as a whole.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

/// Writes a file as a whole: until the last byte is on the disk, its place keeps what was there before.
///
/// The bytes go to a temporary file in the same folder, which takes the file's name at the end. So the folder must allow new files.
/// A file that was there keeps its permissions, and one that may not be written is an error. A symbolic link stays and the file that
/// it leads to is replaced; a link that leads nowhere becomes the file. Other hard links keep what was there before. Whatever is no
/// regular file, such as a device or a pipe, is written to directly.
///
/// # Errors
///
/// Whatever the system says, a full disk above all. The file that was there is then as before.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (target, permissions) = match OpenOptions::new().write(true).open(path) {
        Ok(mut file) => {
            let metadata = file.metadata()?;
            if !metadata.is_file() {
                return file.write_all(bytes);
            }
            (path.canonicalize()?, Some(metadata.permissions()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => (path.to_path_buf(), None),
        Err(error) => return Err(error),
    };
    let mut builder = tempfile::Builder::new();
    // A temporary file is its owner's alone; a new file is not.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = builder.tempfile_in(folder)?;
    file.write_all(bytes)?;
    if let Some(permissions) = permissions {
        file.as_file().set_permissions(permissions)?;
    }
    // Some file systems find out only here that the disk is full.
    file.as_file().sync_all()?;
    file.persist(target)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        for bytes in [&b"longer than the next"[..], b"short", b""] {
            replace(&path, bytes).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        assert!(replace(folder.path(), b"").is_err());
        assert_eq!(replace(&folder.path().join("no/x"), b"").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[cfg(unix)]
    #[test]
    fn permissions_and_links_stay() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let [file, link, plain, lost] = ["file", "link", "plain", "lost"].map(|name| folder.path().join(name));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        std::fs::write(&file, "old").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        symlink("file", &link).unwrap();
        replace(&link, b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!((std::fs::read(&file).unwrap(), mode(&file)), (b"new".to_vec(), 0o640));
        // A new file has the permissions of any new file.
        std::fs::write(&plain, "").unwrap();
        symlink("nowhere", &lost).unwrap();
        replace(&lost, b"new").unwrap();
        assert_eq!((lost.is_symlink(), mode(&lost)), (false, mode(&plain)));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_device_is_written_to_and_not_replaced() {
        // By a link, so that a fault here replaces no device of the machine.
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("full");
        std::os::unix::fs::symlink("/dev/full", &link).unwrap();
        assert_eq!(replace(&link, b"x").unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(link.is_symlink());
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        replace(&link, b"x").unwrap();
        assert!(link.is_symlink());
    }
}
