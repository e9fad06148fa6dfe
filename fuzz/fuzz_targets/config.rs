//! The server's configuration and its file of keys: what is read is written back and read the same.

#![no_main]

use diffusion_sharpening::serve::auth::Keys;
use diffusion_sharpening::serve::{Overrides, Settings};
use diffusion_sharpening_fuzz::with_file;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    with_file(data, |path| {
        let _ = Keys::read(path);
        let Ok(settings) = Settings::resolve(Some(path), Overrides::default()) else { return };
        let text = settings.to_toml().expect("settings are TOML");
        let again = with_file(text.as_bytes(), |path| {
            Settings::resolve(Some(path), Overrides::default())
        });
        assert_eq!(again.expect("settings read back"), settings);
    });
});
