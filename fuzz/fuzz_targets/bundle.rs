//! A bundle: whole archives, and a manifest or an answer in a well-formed one.

#![no_main]

use diffusion_sharpening::engine::bundle::Bundle;
use libfuzzer_sys::fuzz_target;

/// An archive with these files.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        archive.append_data(&mut header, name, *bytes).expect("into memory");
    }
    archive.into_inner().expect("into memory")
}

fn read(bytes: &[u8]) {
    let Ok(bundle) = Bundle::read(bytes) else { return };
    let mut written = Vec::new();
    bundle.write(&mut written).expect("into memory");
    assert_eq!(Bundle::read(&written[..]).expect("what is written is read"), bundle);
}

fuzz_target!(|data: &[u8]| {
    match data.split_first() {
        Some((b'm', manifest)) => {
            read(&archive(&[("bundle.json", manifest), ("answer.json", b"{}")]));
        }
        Some((b'n', name)) => {
            let Ok(name) = std::str::from_utf8(name) else { return };
            if name.len() < 90 && !name.is_empty() && !name.contains(['\0', '\\']) {
                let mut header = tar::Header::new_gnu();
                let Some(gnu) = header.as_gnu_mut() else { return };
                gnu.name[..name.len()].copy_from_slice(name.as_bytes());
                header.set_size(1);
                header.set_cksum();
                let mut archive = tar::Builder::new(Vec::new());
                archive.append(&header, &b"x"[..]).expect("into memory");
                read(&archive.into_inner().expect("into memory"));
            }
        }
        _ => read(data),
    }
});
